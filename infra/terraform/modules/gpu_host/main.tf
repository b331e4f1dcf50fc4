# GPU hosts that bring themselves up with the roles that operators play too, and drain before they go.

locals {
  group = "${var.name}-servers"
  up    = "${var.name}-up"
  drain = "${var.name}-drain"
  ports = { blue_grpc = 50051, green_grpc = 50052, blue_http = 8080, green_http = 8081 }

  # What a host has to know and everybody may: user data is no place for a secret.
  facts = {
    aws_environment  = var.name
    aws_region       = var.region
    aws_bucket       = var.bucket
    aws_secret       = var.secret_arn
    aws_group        = local.group
    aws_up_hook      = local.up
    aws_drain_hook   = local.drain
    aws_release      = var.release
    aws_bundle       = var.bundle
    database_address = var.database_address
    site_network     = [var.cidr]
  }

  cloud_config = {
    package_update = true
    packages       = ["awscli", "ca-certificates", "python3-venv"]
    write_files = [
      { path = "/etc/agentloop-host/facts.json", permissions = "0644", content = jsonencode(local.facts) },
      { path = "/usr/local/sbin/agentloop-bootstrap", permissions = "0755", content = file("${path.module}/files/bootstrap.sh") },
      { path = "/etc/systemd/system/agentloop-bootstrap.service", permissions = "0644", content = file("${path.module}/files/bootstrap.service") },
    ]
    runcmd = [
      ["systemctl", "daemon-reload"],
      ["systemctl", "enable", "--now", "--no-block", "agentloop-bootstrap.service"],
    ]
  }
}

resource "aws_security_group" "this" {
  name        = local.group
  description = "Hosts that serve: reached from their own network alone"
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "serving" {
  for_each          = local.ports
  security_group_id = aws_security_group.this.id
  cidr_ipv4         = var.cidr
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  description       = "gateways and metrics: ${replace(each.key, "_", " ")}"
}

# Debian's packages, and AWS; no prompt is sent to either.
resource "aws_vpc_security_group_egress_rule" "out" {
  for_each          = { http = 80, https = 443 }
  security_group_id = aws_security_group.this.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = each.value
  to_port           = each.value
  description       = "packages and AWS, by ${each.key}"
}

resource "aws_vpc_security_group_egress_rule" "postgres" {
  security_group_id = aws_security_group.this.id
  cidr_ipv4         = var.cidr
  ip_protocol       = "tcp"
  from_port         = 5432
  to_port           = 5432
  description       = "the log"
}

resource "aws_launch_template" "this" {
  name                   = local.group
  description            = "A host that serves"
  image_id               = var.ami_id
  instance_type          = var.instance_types[0]
  update_default_version = true
  ebs_optimized          = true
  user_data              = base64encode("#cloud-config\n${yamlencode(local.cloud_config)}")

  iam_instance_profile {
    name = var.instance_profile_name
  }

  # A session token first, and one hop: no request that a server is tricked into can fetch the host's credentials.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  network_interfaces {
    associate_public_ip_address = false
    delete_on_termination       = true
    security_groups             = [aws_security_group.this.id]
  }

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_type           = "gp3"
      volume_size           = var.disk_gib
      encrypted             = true
      delete_on_termination = true
    }
  }

  monitoring {
    enabled = true
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = local.group, environment = var.name }
  }

  tag_specifications {
    resource_type = "volume"
    tags          = { Name = local.group, environment = var.name }
  }
}

resource "aws_autoscaling_group" "this" {
  name                = local.group
  min_size            = var.min_hosts
  max_size            = var.max_hosts
  vpc_zone_identifier = var.subnet_ids

  # Spot alone: a host that is likely to be taken gets a successor before it goes.
  capacity_rebalance = var.spot

  # A new host is known to the gateways when Ansible has played: nothing may replace hosts behind its back to be tidy.
  suspended_processes       = ["AZRebalance"]
  termination_policies      = ["OldestLaunchTemplate", "OldestInstance"]
  health_check_type         = "EC2"
  health_check_grace_period = 300
  default_instance_warmup   = 300
  wait_for_capacity_timeout = "0"
  enabled_metrics           = ["GroupDesiredCapacity", "GroupInServiceInstances", "GroupTerminatingInstances"]

  mixed_instances_policy {
    instances_distribution {
      on_demand_base_capacity                  = 0
      on_demand_percentage_above_base_capacity = var.spot ? 0 : 100
      spot_allocation_strategy                 = "price-capacity-optimized"
    }
    launch_template {
      launch_template_specification {
        launch_template_id = aws_launch_template.this.id
        version            = aws_launch_template.this.latest_version
      }
      dynamic "override" {
        for_each = var.instance_types
        content {
          instance_type = override.value
        }
      }
    }
  }

  tag {
    key                 = "environment"
    value               = var.name
    propagate_at_launch = true
  }
}

# In service is who has brought itself up; who has not in time is replaced.
resource "aws_autoscaling_lifecycle_hook" "up" {
  name                   = local.up
  autoscaling_group_name = aws_autoscaling_group.this.name
  lifecycle_transition   = "autoscaling:EC2_INSTANCE_LAUNCHING"
  heartbeat_timeout      = var.bring_up_seconds
  default_result         = "ABANDON"
}

# Who is to go ends its streams and empties its spool first, and says so. A dead host says nothing: it goes in time.
resource "aws_autoscaling_lifecycle_hook" "drain" {
  name                   = local.drain
  autoscaling_group_name = aws_autoscaling_group.this.name
  lifecycle_transition   = "autoscaling:EC2_INSTANCE_TERMINATING"
  heartbeat_timeout      = var.drain_seconds
  default_result         = "CONTINUE"
}

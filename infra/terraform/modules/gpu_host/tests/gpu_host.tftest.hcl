mock_provider "aws" {}

variables {
  name                  = "stage"
  vpc_id                = "vpc-1"
  cidr                  = "10.40.0.0/16"
  subnet_ids            = ["subnet-1", "subnet-2"]
  ami_id                = "ami-0123456789abcdef0"
  instance_types        = ["g6.xlarge", "g5.xlarge"]
  instance_profile_name = "stage-host"
  region                = "us-east-1"
  bucket                = "agentloop-stage"
  secret_arn            = "arn:aws:secretsmanager:us-east-1:123456789012:secret:stage-AbCdEf"
  release               = "0.1.0-0123456789ab"
  bundle                = "0123456789ab"
  database_address      = "stage.example.us-east-1.rds.amazonaws.com"
}

run "a_host_is_private_encrypted_and_gives_its_credentials_to_no_trick" {
  command = plan
  assert {
    condition     = aws_launch_template.this.metadata_options[0].http_tokens == "required" && aws_launch_template.this.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "IMDSv2 alone, and one hop"
  }
  assert {
    condition     = tobool(aws_launch_template.this.block_device_mappings[0].ebs[0].encrypted)
    error_message = "its disk is encrypted"
  }
  assert {
    condition     = !tobool(aws_launch_template.this.network_interfaces[0].associate_public_ip_address)
    error_message = "it has no public address"
  }
  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.serving : rule.cidr_ipv4 == "10.40.0.0/16" && rule.from_port == rule.to_port])
    error_message = "it is reached from its own network, at its ports"
  }
  assert {
    condition     = length(aws_vpc_security_group_ingress_rule.serving) == 4
    error_message = "two colours, gRPC and HTTP, and no SSH"
  }
}

run "it_drains_before_it_goes_and_is_in_service_when_it_is_up" {
  command = plan
  assert {
    condition     = aws_autoscaling_lifecycle_hook.drain.lifecycle_transition == "autoscaling:EC2_INSTANCE_TERMINATING" && aws_autoscaling_lifecycle_hook.drain.heartbeat_timeout == 900
    error_message = "scale-in waits for it"
  }
  assert {
    condition     = aws_autoscaling_lifecycle_hook.drain.default_result == "CONTINUE"
    error_message = "a dead host holds nothing up"
  }
  assert {
    condition     = aws_autoscaling_lifecycle_hook.up.default_result == "ABANDON"
    error_message = "who does not come up is replaced"
  }
}

run "on_demand_is_all_on_demand" {
  command = plan
  assert {
    condition     = aws_autoscaling_group.this.mixed_instances_policy[0].instances_distribution[0].on_demand_percentage_above_base_capacity == 100 && !aws_autoscaling_group.this.capacity_rebalance
    error_message = "no spot"
  }
  assert {
    condition     = join(" ", [for each in aws_autoscaling_group.this.mixed_instances_policy[0].launch_template[0].override : each.instance_type]) == "g6.xlarge g5.xlarge"
    error_message = "the kinds in their order"
  }
}

run "spot_is_all_spot_and_gets_successors_early" {
  command = plan
  variables {
    spot = true
  }
  assert {
    condition     = aws_autoscaling_group.this.mixed_instances_policy[0].instances_distribution[0].on_demand_percentage_above_base_capacity == 0 && aws_autoscaling_group.this.capacity_rebalance
    error_message = "spot"
  }
}

run "user_data_names_the_secret_and_holds_none" {
  command = plan
  assert {
    condition     = startswith(base64decode(aws_launch_template.this.user_data), "#cloud-config\n")
    error_message = "cloud-init knows it by its first line"
  }
  assert {
    condition     = length(base64decode(aws_launch_template.this.user_data)) < 16384
    error_message = "EC2 takes 16 KiB"
  }
  assert {
    condition     = jsondecode(yamldecode(base64decode(aws_launch_template.this.user_data)).write_files[0].content).aws_secret == var.secret_arn
    error_message = "it says where the secret is"
  }
  assert {
    condition     = !can(regex("(?i)password|private key|token_value", jsonencode(local.facts)))
    error_message = "and nothing of what it holds"
  }
}

run "a_type_without_a_gpu_is_refused" {
  command = plan
  variables {
    instance_types = ["g6.xlarge", "m7g.large"]
  }
  expect_failures = [var.instance_types]
}

run "no_type_is_refused" {
  command = plan
  variables {
    instance_types = []
  }
  expect_failures = [var.instance_types]
}

run "fewer_at_most_than_at_least_is_refused" {
  command = plan
  variables {
    min_hosts = 3
    max_hosts = 2
  }
  expect_failures = [var.max_hosts]
}

run "half_a_host_is_refused" {
  command = plan
  variables {
    min_hosts = 0.5
  }
  expect_failures = [var.min_hosts]
}

run "a_network_that_is_everybody_is_refused" {
  command = plan
  variables {
    cidr = "0.0.0.0/0"
  }
  expect_failures = [var.cidr]
}

run "one_subnet_is_refused" {
  command = plan
  variables {
    subnet_ids = ["subnet-1"]
  }
  expect_failures = [var.subnet_ids]
}

run "an_image_by_its_name_is_refused" {
  command = plan
  variables {
    ami_id = "debian-12"
  }
  expect_failures = [var.ami_id]
}

run "a_disk_without_room_for_models_is_refused" {
  command = plan
  variables {
    disk_gib = 8
  }
  expect_failures = [var.disk_gib]
}

run "no_time_to_drain_is_refused" {
  command = plan
  variables {
    drain_seconds = 30
  }
  expect_failures = [var.drain_seconds]
}

run "no_time_to_come_up_is_refused" {
  command = plan
  variables {
    bring_up_seconds = 60
  }
  expect_failures = [var.bring_up_seconds]
}

run "a_secret_in_place_of_its_name_is_refused" {
  command = plan
  variables {
    secret_arn = "hunter2"
  }
  expect_failures = [var.secret_arn]
}

run "a_release_that_is_a_path_is_refused" {
  command = plan
  variables {
    release = "../../etc/passwd"
  }
  expect_failures = [var.release]
}

run "a_bundle_that_is_a_command_is_refused" {
  command = plan
  variables {
    bundle = "$(reboot)"
  }
  expect_failures = [var.bundle]
}

run "a_name_with_capitals_is_refused" {
  command = plan
  variables {
    name = "Stage"
  }
  expect_failures = [var.name]
}

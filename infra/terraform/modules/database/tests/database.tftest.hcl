mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-central-1:123456789012:key/1", key_id = "1" }
  }
}

variables {
  name                      = "stage"
  vpc_id                    = "vpc-1"
  subnet_ids                = ["subnet-1", "subnet-2"]
  client_security_group_ids = { hosts = "sg-1" }
}

run "it_is_encrypted_private_over_tls_and_kept" {
  assert {
    condition     = aws_db_instance.this.storage_encrypted && !aws_db_instance.this.publicly_accessible
    error_message = "encrypted, and not reached from outside"
  }
  assert {
    condition     = contains([for each in aws_db_parameter_group.this.parameter : "${each.name}=${each.value}"], "rds.force_ssl=1")
    error_message = "who comes without TLS is refused"
  }
  assert {
    condition     = aws_db_instance.this.manage_master_user_password && aws_db_instance.this.password == null
    error_message = "no password is in the state"
  }
  assert {
    condition     = aws_db_instance.this.deletion_protection && !aws_db_instance.this.skip_final_snapshot
    error_message = "it is not destroyed by mistake"
  }
  assert {
    condition     = aws_db_instance.this.backup_retention_period == 7 && !aws_db_instance.this.multi_az
    error_message = "a week of backups, no standby"
  }
}

run "its_log_is_encrypted_and_ends_and_holds_no_text_of_a_query" {
  assert {
    condition     = aws_cloudwatch_log_group.postgresql.kms_key_id == aws_kms_key.this.arn && aws_cloudwatch_log_group.postgresql.retention_in_days == 365
    error_message = "with the key, for a year"
  }
  assert {
    condition = length(setintersection(
      [for each in aws_db_parameter_group.this.parameter : "${each.name}=${each.value}"],
      ["log_statement=none", "log_min_error_statement=panic", "log_error_verbosity=terse"],
    )) == 3
    error_message = "a query, its parameters or a failing row may be a prompt"
  }
}

run "only_those_who_are_named_connect_and_to_nothing_but_postgres" {
  variables {
    client_security_group_ids = { hosts = "sg-1", airflow = "sg-2" }
  }
  assert {
    condition     = toset([for rule in aws_vpc_security_group_ingress_rule.postgres : rule.referenced_security_group_id]) == toset(["sg-1", "sg-2"])
    error_message = "both, and nobody else"
  }
  assert {
    condition     = alltrue([for rule in aws_vpc_security_group_ingress_rule.postgres : rule.from_port == 5432 && rule.to_port == 5432 && rule.cidr_ipv4 == null])
    error_message = "one port, and no addresses"
  }
}

run "production_has_a_standby" {
  command = plan
  variables {
    multi_az         = true
    postgres_version = "16.4"
  }
  assert {
    condition     = aws_db_instance.this.multi_az && aws_db_parameter_group.this.family == "postgres16"
    error_message = "a standby, and the parameters of its own version"
  }
}

run "what_may_be_destroyed_leaves_no_snapshot" {
  command = plan
  variables {
    destroyable = true
  }
  assert {
    condition     = !aws_db_instance.this.deletion_protection && aws_db_instance.this.skip_final_snapshot
    error_message = "destroy takes all of it"
  }
}

run "a_postgres_that_is_too_old_is_refused" {
  command = plan
  variables {
    postgres_version = "14.9"
  }
  expect_failures = [var.postgres_version]
}

run "no_backups_are_refused" {
  command = plan
  variables {
    backup_days = 0
  }
  expect_failures = [var.backup_days]
}

run "one_subnet_is_refused" {
  command = plan
  variables {
    subnet_ids = ["subnet-1", "subnet-1"]
  }
  expect_failures = [var.subnet_ids]
}

run "a_database_for_nobody_is_refused" {
  command = plan
  variables {
    client_security_group_ids = {}
  }
  expect_failures = [var.client_security_group_ids]
}

run "a_size_of_ec2_is_refused" {
  command = plan
  variables {
    instance_class = "m7g.large"
  }
  expect_failures = [var.instance_class]
}

run "too_little_storage_is_refused" {
  command = plan
  variables {
    storage_gib = 5
  }
  expect_failures = [var.storage_gib]
}

run "a_name_with_capitals_is_refused" {
  command = plan
  variables {
    name = "Stage"
  }
  expect_failures = [var.name]
}

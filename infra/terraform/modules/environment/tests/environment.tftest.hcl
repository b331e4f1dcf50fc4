mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_region" {
    defaults = { name = "us-east-1" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/1", key_id = "1" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::agentloop-stage" }
  }
  mock_resource "aws_sns_topic" {
    defaults = { arn = "arn:aws:sns:us-east-1:123456789012:stage-alarms" }
  }
  mock_resource "aws_cloudwatch_log_group" {
    defaults = { arn = "arn:aws:logs:us-east-1:123456789012:log-group:1" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/one" }
  }
  mock_resource "aws_secretsmanager_secret" {
    defaults = { arn = "arn:aws:secretsmanager:us-east-1:123456789012:secret:stage-AbCdEf" }
  }
  mock_resource "aws_launch_template" {
    defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
  }
}

# Two subnets that are mocked have one id, which the modules refuse: they want two zones.
override_module {
  target = module.network
  outputs = {
    vpc_id             = "vpc-1"
    cidr               = "10.40.0.0/16"
    private_subnet_ids = ["subnet-1", "subnet-2"]
    public_subnet_ids  = ["subnet-3", "subnet-4"]
  }
}

variables {
  name               = "stage"
  region             = "us-east-1"
  zones              = ["us-east-1a", "us-east-1b"]
  cidr               = "10.40.0.0/16"
  nat_per_zone       = false
  bucket             = "agentloop-stage"
  ami_id             = "ami-0123456789abcdef0"
  instance_types     = ["g6.xlarge"]
  spot               = true
  min_hosts          = 1
  max_hosts          = 2
  disk_gib           = 100
  release            = "0.1.0-0123456789ab"
  bundle             = "0123456789ab"
  database_class     = "db.t4g.medium"
  database_gib       = 50
  multi_az           = false
  backup_days        = 7
  emails             = ["sre@example.org"]
  monthly_budget_usd = 900
  destroyable        = true
}

run "what_ansible_needs_comes_out_and_no_secret_with_it" {
  assert {
    condition     = output.inventory.aws_group == "stage-servers" && output.inventory.site_network == ["10.40.0.0/16"]
    error_message = "the group and the network"
  }
  assert {
    condition     = output.inventory.aws_secret == aws_secretsmanager_secret.hosts.arn
    error_message = "where the secret is"
  }
}

run "what_holds_data_keeps_it_unless_that_is_said" {
  variables {
    destroyable = false
  }
  assert {
    condition     = aws_secretsmanager_secret.hosts.recovery_window_in_days == 30
    error_message = "a secret can be had back for a month"
  }
}

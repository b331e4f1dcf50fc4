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
    defaults = { arn = "arn:aws:kms:us-east-1:123456789012:key/1" }
  }
  mock_resource "aws_sns_topic" {
    defaults = { arn = "arn:aws:sns:us-east-1:123456789012:stage-alarms" }
  }
  mock_resource "aws_cloudwatch_log_group" {
    defaults = { arn = "arn:aws:logs:us-east-1:123456789012:log-group:1" }
  }
  mock_resource "aws_iam_role" {
    defaults = { arn = "arn:aws:iam::123456789012:role/stage-flow-log" }
  }
}

variables {
  name               = "stage"
  vpc_id             = "vpc-1"
  group              = "stage-servers"
  min_hosts          = 2
  database           = "stage"
  database_gib       = 50
  emails             = ["sre@example.org"]
  monthly_budget_usd = 900
}

run "every_alarm_reaches_somebody" {
  assert {
    condition     = alltrue([for alarm in aws_cloudwatch_metric_alarm.this : alarm.alarm_actions == toset([aws_sns_topic.this.arn])])
    error_message = "to the topic"
  }
  assert {
    condition     = join(" ", [for each in aws_sns_topic_subscription.email : each.endpoint]) == "sre@example.org"
    error_message = "and to whom it is told"
  }
  assert {
    condition     = aws_cloudwatch_metric_alarm.this["hosts-missing"].threshold == 2
    error_message = "fewer than two hosts"
  }
  assert {
    condition     = aws_cloudwatch_metric_alarm.this["database-disk"].threshold == 5368709120
    error_message = "a tenth of 50 GiB"
  }
}

run "silence_of_the_database_is_an_alarm" {
  command = plan
  assert {
    condition     = alltrue([for key, alarm in aws_cloudwatch_metric_alarm.this : alarm.treat_missing_data == "breaching" if strcontains(key, "database")])
    error_message = "a database that tells nothing is down"
  }
}

run "logs_are_encrypted_and_end" {
  assert {
    condition     = aws_cloudwatch_log_group.refused.kms_key_id == aws_kms_key.this.arn && aws_cloudwatch_log_group.refused.retention_in_days == 365
    error_message = "with the key, for a year"
  }
  assert {
    condition     = aws_flow_log.refused.traffic_type == "REJECT"
    error_message = "what was refused"
  }
}

run "money_is_counted_for_this_environment_and_told_before_it_is_spent" {
  command = plan
  assert {
    condition     = join(" ", one(aws_budgets_budget.this.cost_filter).values) == "user:environment$stage"
    error_message = "by its tag"
  }
  assert {
    condition     = toset([for each in aws_budgets_budget.this.notification : "${each.notification_type} ${each.threshold}"]) == toset(["ACTUAL 80", "FORECASTED 100"])
    error_message = "at 80 % of it, and when it will not do"
  }
}

run "an_alarm_for_nobody_is_refused" {
  command = plan
  variables {
    emails = []
  }
  expect_failures = [var.emails]
}

run "an_address_that_is_none_is_refused" {
  command = plan
  variables {
    emails = ["sre"]
  }
  expect_failures = [var.emails]
}

run "no_money_is_refused" {
  command = plan
  variables {
    monthly_budget_usd = 0
  }
  expect_failures = [var.monthly_budget_usd]
}

run "days_that_cloudwatch_does_not_know_are_refused" {
  command = plan
  variables {
    log_days = 100
  }
  expect_failures = [var.log_days]
}

run "less_than_no_host_is_refused" {
  command = plan
  variables {
    min_hosts = -1
  }
  expect_failures = [var.min_hosts]
}

run "a_disk_that_no_database_has_is_refused" {
  command = plan
  variables {
    database_gib = 5
  }
  expect_failures = [var.database_gib]
}

run "a_name_with_capitals_is_refused" {
  command = plan
  variables {
    name = "Stage"
  }
  expect_failures = [var.name]
}

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_data "aws_region" {
    defaults = { name = "eu-central-1" }
  }
}

variables {
  name       = "stage"
  bucket_arn = "arn:aws:s3:::agentloop-stage"
  key_arns   = ["arn:aws:kms:eu-central-1:123456789012:key/1a2b"]
}

run "no_action_is_a_star_and_every_resource_is_named" {
  assert {
    condition = alltrue([
      for statement in jsondecode(aws_iam_role_policy.host.policy).Statement :
      alltrue([for action in statement.Action : !strcontains(action, "*")]) && !contains(statement.Resource, "*")
    ])
    error_message = "least privilege: no star for an action, none for everything"
  }
  assert {
    condition     = !strcontains(aws_iam_role_policy.host.policy, "Delete")
    error_message = "a host deletes nothing"
  }
  assert {
    condition     = !strcontains(aws_iam_role_policy.host.policy, "secretsmanager")
    error_message = "without secrets it may read none"
  }
  assert {
    condition     = jsondecode(aws_iam_role.host.assume_role_policy).Statement[0].Principal.Service == "ec2.amazonaws.com"
    error_message = "only EC2's instances take the role"
  }
}

run "models_and_releases_are_read_and_never_written" {
  assert {
    condition = alltrue([
      for statement in jsondecode(aws_iam_role_policy.host.policy).Statement :
      !contains(statement.Action, "s3:PutObject") || !anytrue([for kept in ["models", "releases"] : contains(statement.Resource, "arn:aws:s3:::agentloop-stage/${kept}/*")])
    ])
    error_message = "whoever takes over a host cannot replace the models or the code of the others"
  }
}

run "secrets_that_are_named_can_be_read_and_no_others" {
  variables {
    secret_arns = ["arn:aws:secretsmanager:eu-central-1:123456789012:secret:rds!db-1-AbCdEf"]
  }
  assert {
    condition     = tolist(one([for statement in jsondecode(aws_iam_role_policy.host.policy).Statement : statement.Resource if statement.Sid == "ReadItsSecrets"])) == var.secret_arns
    error_message = "these"
  }
}

run "a_bucket_with_a_star_is_refused" {
  command = plan
  variables {
    bucket_arn = "arn:aws:s3:::*"
  }
  expect_failures = [var.bucket_arn]
}

run "every_key_is_refused" {
  command = plan
  variables {
    key_arns = ["arn:aws:kms:eu-central-1:123456789012:key/*"]
  }
  expect_failures = [var.key_arns]
}

run "every_secret_is_refused" {
  command = plan
  variables {
    secret_arns = ["arn:aws:secretsmanager:eu-central-1:123456789012:secret:*"]
  }
  expect_failures = [var.secret_arns]
}

run "a_name_with_capitals_is_refused" {
  command = plan
  variables {
    name = "Stage"
  }
  expect_failures = [var.name]
}

mock_provider "aws" {
  mock_data "aws_caller_identity" {
    defaults = { account_id = "123456789012" }
  }
  mock_data "aws_partition" {
    defaults = { partition = "aws" }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { arn = "arn:aws:s3:::agentloop-stage" }
  }
  mock_resource "aws_kms_key" {
    defaults = { arn = "arn:aws:kms:eu-central-1:123456789012:key/1", key_id = "1" }
  }
}

variables {
  name = "agentloop-stage"
}

run "the_bucket_is_versioned_encrypted_private_and_over_tls" {
  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "what was overwritten can be had back"
  }
  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.this.block_public_acls,
      aws_s3_bucket_public_access_block.this.block_public_policy,
      aws_s3_bucket_public_access_block.this.ignore_public_acls,
      aws_s3_bucket_public_access_block.this.restrict_public_buckets,
    ])
    error_message = "nothing is public, whoever asks for it"
  }
  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default).kms_master_key_id == aws_kms_key.this.arn
    error_message = "encrypted with the key of its own"
  }
  assert {
    condition     = aws_kms_key.this.enable_key_rotation
    error_message = "the key is rotated"
  }
  assert {
    condition     = jsondecode(aws_s3_bucket_policy.tls_only.policy).Statement[0].Effect == "Deny"
    error_message = "who comes without TLS is refused"
  }
  assert {
    condition     = !aws_s3_bucket.this.force_destroy
    error_message = "a bucket that holds something is not destroyed unless that is asked for"
  }
}

run "a_bucket_name_with_an_underscore_is_refused" {
  command = plan
  variables {
    name = "agentloop_stage"
  }
  expect_failures = [var.name]
}

run "a_bucket_name_that_ends_with_a_hyphen_is_refused" {
  command = plan
  variables {
    name = "agentloop-"
  }
  expect_failures = [var.name]
}

run "what_s3_would_refuse_is_refused_here" {
  command = plan
  variables {
    cold_after_days = 7
  }
  expect_failures = [var.cold_after_days]
}

run "a_day_is_too_short_to_notice_a_loss" {
  command = plan
  variables {
    former_versions_days = 1
  }
  expect_failures = [var.former_versions_days]
}

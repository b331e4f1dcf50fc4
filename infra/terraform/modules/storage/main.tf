# One bucket for cycles, models and backups: versioned, encrypted with a key of its own, over TLS only, never public.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

resource "aws_kms_key" "this" {
  description             = "What ${var.name} holds"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "TheAccountsOwnPolicies"
      Effect    = "Allow"
      Principal = { AWS = "arn:${data.aws_partition.current.partition}:iam::${data.aws_caller_identity.current.account_id}:root" }
      Action    = "kms:*"
      Resource  = "*"
    }]
  })
}

resource "aws_kms_alias" "this" {
  name          = "alias/${var.name}"
  target_key_id = aws_kms_key.this.key_id
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_18:An access log needs a second bucket; who reads is one role, and CloudTrail tells of data events where an account wants that
  #checkov:skip=CKV_AWS_144:What is here leaves its region only if its owner says so; former versions are kept against loss by mistake
  #checkov:skip=CKV2_AWS_62:Nothing waits for events of this bucket: the nights run by their own clock
  bucket        = var.name
  force_destroy = var.destroyable
}

resource "aws_s3_bucket_versioning" "this" {
  bucket = aws_s3_bucket.this.id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  bucket = aws_s3_bucket.this.id
  rule {
    bucket_key_enabled = true
    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = aws_kms_key.this.arn
    }
  }
}

resource "aws_s3_bucket_public_access_block" "this" {
  bucket                  = aws_s3_bucket.this.id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_ownership_controls" "this" {
  bucket = aws_s3_bucket.this.id
  rule {
    object_ownership = "BucketOwnerEnforced"
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "this" {
  bucket = aws_s3_bucket.this.id

  rule {
    id     = "former versions go"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = var.former_versions_days
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }

  # Spools of hosts that went while the database was down: they hold prompts, and are put back within days, or never.
  rule {
    id     = "saved spools end"
    status = "Enabled"
    filter {
      prefix = "backups/spools/"
    }
    expiration {
      days = 30
    }
  }

  rule {
    id     = "old cycles are seldom read"
    status = "Enabled"
    filter {
      prefix = "cycles/"
    }
    transition {
      days          = var.cold_after_days
      storage_class = "STANDARD_IA"
    }
  }

  depends_on = [aws_s3_bucket_versioning.this]
}

resource "aws_s3_bucket_policy" "tls_only" {
  bucket = aws_s3_bucket.this.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Sid       = "OverTlsOnly"
      Effect    = "Deny"
      Principal = "*"
      Action    = "s3:*"
      Resource  = [aws_s3_bucket.this.arn, "${aws_s3_bucket.this.arn}/*"]
      Condition = { Bool = { "aws:SecureTransport" = "false" } }
    }]
  })
  depends_on = [aws_s3_bucket_public_access_block.this]
}

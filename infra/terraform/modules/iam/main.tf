# What a host may do: read models, write cycles and backups, read its secrets, say that it has drained. No more.

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

data "aws_region" "current" {}

locals {
  groups = "arn:${data.aws_partition.current.partition}:autoscaling:${data.aws_region.current.name}:${data.aws_caller_identity.current.account_id}:autoScalingGroup:*:autoScalingGroupName/${var.name}-*"
  statements = concat(
    [
      {
        Sid      = "FindObjects"
        Effect   = "Allow"
        Action   = ["s3:ListBucket", "s3:GetBucketLocation"]
        Resource = [var.bucket_arn]
      },
      {
        Sid      = "ReadObjects"
        Effect   = "Allow"
        Action   = ["s3:GetObject"]
        Resource = ["${var.bucket_arn}/models/*", "${var.bucket_arn}/releases/*", "${var.bucket_arn}/cycles/*", "${var.bucket_arn}/backups/*"]
      },
      {
        Sid    = "WriteCyclesAndBackups"
        Effect = "Allow"
        # Nothing is deleted by a host; the bucket's lifecycle does that, and former versions stay for a while.
        Action   = ["s3:PutObject", "s3:AbortMultipartUpload"]
        Resource = ["${var.bucket_arn}/cycles/*", "${var.bucket_arn}/backups/*"]
      },
      {
        Sid      = "UseTheKeys"
        Effect   = "Allow"
        Action   = ["kms:Decrypt", "kms:GenerateDataKey"]
        Resource = var.key_arns
      },
      {
        Sid      = "SayThatItHasDrained"
        Effect   = "Allow"
        Action   = ["autoscaling:CompleteLifecycleAction", "autoscaling:RecordLifecycleActionHeartbeat"]
        Resource = [local.groups]
      },
    ],
    length(var.secret_arns) == 0 ? [] : [{
      Sid      = "ReadItsSecrets"
      Effect   = "Allow"
      Action   = ["secretsmanager:GetSecretValue"]
      Resource = var.secret_arns
    }],
  )
}

resource "aws_iam_role" "host" {
  name = "${var.name}-host"
  assume_role_policy = jsonencode({
    Version = "2012-10-17"
    Statement = [{
      Effect    = "Allow"
      Action    = "sts:AssumeRole"
      Principal = { Service = "ec2.amazonaws.com" }
    }]
  })
}

resource "aws_iam_role_policy" "host" {
  name   = "${var.name}-host"
  role   = aws_iam_role.host.id
  policy = jsonencode({ Version = "2012-10-17", Statement = local.statements })
}

# Operators come by Session Manager: no host has an open SSH port, or a key that somebody could lose.
resource "aws_iam_role_policy_attachment" "session_manager" {
  role       = aws_iam_role.host.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}

resource "aws_iam_instance_profile" "host" {
  name = "${var.name}-host"
  role = aws_iam_role.host.name
}

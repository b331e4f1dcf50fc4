# The bucket that holds the states of stage and prod, made once an account. Its own state stays on your disk: keep it, or
# import the bucket again. A state is locked by a file beside it (use_lockfile): no table is needed.
#
#   terraform -chdir=infra/terraform/bootstrap init && terraform -chdir=infra/terraform/bootstrap apply

terraform {
  required_version = ">= 1.11"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

variable "bucket" {
  description = "What the bucket of the states is called; unique in all of AWS."
  type        = string
}

variable "region" {
  description = "Where it is."
  type        = string
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { service = "agentloop", environment = "all" }
  }
}

module "storage" {
  source = "../modules/storage"
  name   = var.bucket
}

output "backend" {
  description = "For `terraform init` of stage and prod."
  value       = "-backend-config=bucket=${module.storage.bucket} -backend-config=region=${var.region}"
}

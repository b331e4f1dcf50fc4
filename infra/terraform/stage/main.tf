# Where releases are tried: small, on spare capacity, and gone when it is destroyed.
# Its numbers are in settings.yaml, which `make terraform-cost` reads too; what is yours is in terraform.tfvars.

terraform {
  required_version = ">= 1.11"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
  # Its bucket and region: terraform init -backend-config=bucket=… -backend-config=region=…
  backend "s3" {
    key          = "stage/terraform.tfstate"
    encrypt      = true
    use_lockfile = true
  }
}

locals {
  settings = yamldecode(file("${path.module}/settings.yaml"))
}

provider "aws" {
  region = local.settings.region
  default_tags {
    tags = { service = "agentloop", environment = "stage" }
  }
}

module "environment" {
  source             = "../modules/environment"
  name               = "stage"
  region             = local.settings.region
  zones              = local.settings.zones
  cidr               = local.settings.cidr
  nat_per_zone       = local.settings.nat_per_zone
  instance_types     = local.settings.instance_types
  spot               = local.settings.spot
  min_hosts          = local.settings.min_hosts
  max_hosts          = local.settings.max_hosts
  disk_gib           = local.settings.disk_gib
  database_class     = local.settings.database_class
  database_gib       = local.settings.database_gib
  multi_az           = local.settings.multi_az
  backup_days        = local.settings.backup_days
  monthly_budget_usd = local.settings.monthly_budget_usd
  destroyable        = local.settings.destroyable
  bucket             = var.bucket
  ami_id             = var.ami_id
  release            = var.release
  bundle             = var.bundle
  emails             = var.emails
}

# One environment, whole. `stage` and `prod` are this with other numbers.

module "network" {
  source       = "../network"
  name         = var.name
  cidr         = var.cidr
  zones        = var.zones
  nat_per_zone = var.nat_per_zone
}

module "storage" {
  source      = "../storage"
  name        = var.bucket
  destroyable = var.destroyable
}

# Its value is put there by an operator (docs/operations/aws.md), so that no state ever holds it.
resource "aws_secretsmanager_secret" "hosts" {
  #checkov:skip=CKV2_AWS_57:What it holds (a certificate's key, the key of hashes) is changed by an operator with rotate-credentials; a key of hashes that changed by itself would break the log's hashes
  name                    = "${var.name}/hosts"
  description             = "Variables of Ansible for hosts: a JSON object"
  kms_key_id              = module.storage.key_arn
  recovery_window_in_days = var.destroyable ? 0 : 30
}

module "iam" {
  source      = "../iam"
  name        = var.name
  bucket_arn  = module.storage.bucket_arn
  key_arns    = [module.storage.key_arn]
  secret_arns = [aws_secretsmanager_secret.hosts.arn]
}

module "database" {
  source                    = "../database"
  name                      = var.name
  vpc_id                    = module.network.vpc_id
  subnet_ids                = module.network.private_subnet_ids
  client_security_group_ids = { servers = module.gpu_host.security_group_id }
  instance_class            = var.database_class
  storage_gib               = var.database_gib
  multi_az                  = var.multi_az
  backup_days               = var.backup_days
  destroyable               = var.destroyable
}

module "gpu_host" {
  source                = "../gpu_host"
  name                  = var.name
  vpc_id                = module.network.vpc_id
  cidr                  = module.network.cidr
  subnet_ids            = module.network.private_subnet_ids
  ami_id                = var.ami_id
  instance_types        = var.instance_types
  spot                  = var.spot
  min_hosts             = var.min_hosts
  max_hosts             = var.max_hosts
  disk_gib              = var.disk_gib
  instance_profile_name = module.iam.instance_profile_name
  region                = var.region
  bucket                = module.storage.bucket
  secret_arn            = aws_secretsmanager_secret.hosts.arn
  release               = var.release
  bundle                = var.bundle
  database_address      = module.database.address
}

module "observability" {
  source             = "../observability"
  name               = var.name
  vpc_id             = module.network.vpc_id
  group              = module.gpu_host.group
  min_hosts          = var.min_hosts
  database           = var.name
  database_gib       = var.database_gib
  emails             = var.emails
  monthly_budget_usd = var.monthly_budget_usd
}

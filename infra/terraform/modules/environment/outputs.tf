output "inventory" {
  description = "What infra/ansible/inventories/aws needs to find the hosts; nothing of it is secret."
  value = {
    aws_environment  = var.name
    aws_region       = var.region
    aws_group        = module.gpu_host.group
    aws_bucket       = module.storage.bucket
    aws_secret       = aws_secretsmanager_secret.hosts.arn
    database_address = module.database.address
    site_network     = [module.network.cidr]
  }
}

output "database_secret_arn" {
  description = "Where RDS keeps the owner's password, which is needed once, to make the service's own user."
  value       = module.database.secret_arn
}

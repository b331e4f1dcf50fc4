output "inventory" {
  description = "For infra/ansible/inventories/aws."
  value       = module.environment.inventory
}

output "database_secret_arn" {
  description = "Where RDS keeps the owner's password."
  value       = module.environment.database_secret_arn
}

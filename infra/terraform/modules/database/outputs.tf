output "address" {
  description = "Its host name."
  value       = aws_db_instance.this.address
}

output "port" {
  description = "Its port."
  value       = aws_db_instance.this.port
}

output "security_group_id" {
  description = "Its security group."
  value       = aws_security_group.this.id
}

output "secret_arn" {
  description = "Where Secrets Manager keeps the owner's password."
  value       = one(aws_db_instance.this.master_user_secret[*].secret_arn)
}

output "key_arn" {
  description = "The key that it, and that password, are encrypted with."
  value       = aws_kms_key.this.arn
}

output "group" {
  description = "The autoscaling group, whose instances are the inventory's servers."
  value       = aws_autoscaling_group.this.name
}

output "security_group_id" {
  description = "Who the hosts are to the database."
  value       = aws_security_group.this.id
}

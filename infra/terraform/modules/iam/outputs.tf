output "instance_profile_name" {
  description = "What hosts are started with."
  value       = aws_iam_instance_profile.host.name
}

output "role_arn" {
  description = "Who hosts are."
  value       = aws_iam_role.host.arn
}

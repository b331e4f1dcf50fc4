output "bucket" {
  description = "The bucket's name."
  value       = aws_s3_bucket.this.id
}

output "bucket_arn" {
  description = "The bucket."
  value       = aws_s3_bucket.this.arn
}

output "key_arn" {
  description = "The key that its objects are encrypted with."
  value       = aws_kms_key.this.arn
}

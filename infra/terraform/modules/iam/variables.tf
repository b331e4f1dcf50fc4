variable "name" {
  description = "What everything here is called: the environment."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name is \"${var.name}\"; it must be 2 to 31 of a-z, 0-9 and -, and begin with a letter."
  }
}

variable "bucket_arn" {
  description = "The bucket of cycles, models and backups."
  type        = string
  validation {
    condition     = can(regex("^arn:aws[a-z-]*:s3:::[a-z0-9-]+$", var.bucket_arn))
    error_message = "bucket_arn is \"${var.bucket_arn}\"; it must be one bucket's ARN, without a path or a star."
  }
}

variable "key_arns" {
  description = "The keys of that bucket and of the secrets."
  type        = list(string)
  validation {
    condition     = length(var.key_arns) > 0 && alltrue([for arn in var.key_arns : can(regex("^arn:aws[a-z-]*:kms:[a-z0-9-]+:[0-9]{12}:key/[A-Za-z0-9-]+$", arn))])
    error_message = "key_arns must be keys' ARNs, one at least, each whole: no alias and no star."
  }
}

variable "secret_arns" {
  description = "Secrets that hosts may read: the database's password, the servers' tokens."
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for arn in var.secret_arns : can(regex("^arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:[A-Za-z0-9/_+=.@!-]+$", arn))])
    error_message = "secret_arns must be secrets' ARNs, each whole, without a star."
  }
}

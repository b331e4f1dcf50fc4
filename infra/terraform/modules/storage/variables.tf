variable "name" {
  description = "What the bucket is called; unique in all of AWS."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.name))
    error_message = "name is \"${var.name}\"; a bucket's is 3 to 63 of a-z, 0-9 and -, with no - at its ends."
  }
}

variable "former_versions_days" {
  description = "Days for which what was overwritten or deleted can be had back."
  type        = number
  default     = 90
  validation {
    condition     = var.former_versions_days >= 7 && floor(var.former_versions_days) == var.former_versions_days
    error_message = "former_versions_days is ${var.former_versions_days}; it must be a whole number of at least 7."
  }
}

variable "cold_after_days" {
  description = "Days after which cycles go to cheaper storage (Standard-IA, which wants 30 at least)."
  type        = number
  default     = 60
  validation {
    condition     = var.cold_after_days >= 30 && floor(var.cold_after_days) == var.cold_after_days
    error_message = "cold_after_days is ${var.cold_after_days}; S3 moves nothing to Standard-IA before 30 days."
  }
}

variable "destroyable" {
  description = "Whether `terraform destroy` may take the bucket with all that is in it."
  type        = bool
  default     = false
}

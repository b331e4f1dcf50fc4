variable "name" {
  description = "What everything here is called: the environment."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name is \"${var.name}\"; it must be 2 to 31 of a-z, 0-9 and -, and begin with a letter."
  }
}

variable "vpc_id" {
  description = "The network."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets, of two zones at least."
  type        = list(string)
  validation {
    condition     = length(distinct(var.subnet_ids)) >= 2
    error_message = "subnet_ids must name two subnets at least, in different zones: RDS wants that."
  }
}

variable "client_security_group_ids" {
  description = "Security groups of those who may connect, by a name of your choice each; nobody else can."
  type        = map(string)
  validation {
    condition     = length(var.client_security_group_ids) > 0
    error_message = "client_security_group_ids is empty: nobody could connect."
  }
}

variable "postgres_version" {
  description = "Postgres, 15 or later; a major version alone takes its newest minor one."
  type        = string
  default     = "17"
  validation {
    condition     = can(regex("^(1[5-9]|[2-9][0-9])([.][0-9]+)?$", var.postgres_version))
    error_message = "postgres_version is \"${var.postgres_version}\"; it must be 15 or later, as \"17\" or \"17.4\"."
  }
}

variable "instance_class" {
  description = "Its size."
  type        = string
  default     = "db.t4g.medium"
  validation {
    condition     = startswith(var.instance_class, "db.")
    error_message = "instance_class is \"${var.instance_class}\"; RDS' begin with \"db.\"."
  }
}

variable "storage_gib" {
  description = "GiB at first; it grows by itself up to five times as much."
  type        = number
  default     = 50
  validation {
    condition     = var.storage_gib >= 20 && var.storage_gib <= 13107
    error_message = "storage_gib is ${var.storage_gib}; it must be from 20 to 13107 (a fifth of RDS' most)."
  }
}

variable "multi_az" {
  description = "A standby in another zone, which takes over by itself; twice the price."
  type        = bool
  default     = false
}

variable "backup_days" {
  description = "Days to any moment of which it can be restored."
  type        = number
  default     = 7
  validation {
    condition     = var.backup_days >= 1 && var.backup_days <= 35
    error_message = "backup_days is ${var.backup_days}; RDS keeps from 1 to 35 days, and without backups a lost disk is a lost log."
  }
}

variable "destroyable" {
  description = "Whether `terraform destroy` may take it, without a last snapshot."
  type        = bool
  default     = false
}

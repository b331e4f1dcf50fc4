variable "name" {
  description = "What everything here is called: the environment."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name is \"${var.name}\"; it must be 2 to 31 of a-z, 0-9 and -, and begin with a letter."
  }
}

variable "vpc_id" {
  description = "The network, of which refused connections are logged."
  type        = string
}

variable "group" {
  description = "The autoscaling group of the servers."
  type        = string
}

variable "min_hosts" {
  description = "Hosts that must be in service."
  type        = number
  validation {
    condition     = var.min_hosts >= 0 && floor(var.min_hosts) == var.min_hosts
    error_message = "min_hosts is ${var.min_hosts}; it must be a whole number, 0 or more."
  }
}

variable "database" {
  description = "The database: the environment's name."
  type        = string
}

variable "database_gib" {
  description = "GiB of the database's disk at first: an alarm is for a tenth of it left."
  type        = number
  validation {
    condition     = var.database_gib >= 20
    error_message = "database_gib is ${var.database_gib}; it must be 20 at least, as the database's."
  }
}

variable "emails" {
  description = "Who is told of alarms, and of money; each gets a message to confirm first."
  type        = list(string)
  validation {
    condition     = length(var.emails) > 0 && alltrue([for email in var.emails : can(regex("^[^@ ]+@[^@ ]+[.][^@ ]+$", email))])
    error_message = "emails must be addresses, one at least: an alarm that nobody hears is none."
  }
}

variable "log_days" {
  description = "Days for which logs are kept, as CloudWatch allows them."
  type        = number
  default     = 365
  validation {
    condition     = contains([1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731], var.log_days)
    error_message = "log_days is ${var.log_days}; CloudWatch keeps logs for 1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545 or 731 days."
  }
}

variable "monthly_budget_usd" {
  description = "USD a month: at 80 % spent, and when all of it is forecast to be, somebody is told."
  type        = number
  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd is ${var.monthly_budget_usd}; it must be more than 0: `make terraform-cost` estimates it."
  }
}

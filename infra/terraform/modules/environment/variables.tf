# What is refused here, and why, the modules say that each of these goes to.

variable "name" {
  description = "The environment."
  type        = string
}

variable "region" {
  description = "Where it is: the provider's region."
  type        = string
}

variable "zones" {
  description = "Availability zones, two at least."
  type        = list(string)
}

variable "cidr" {
  description = "Addresses of the network."
  type        = string
}

variable "nat_per_zone" {
  description = "A NAT gateway in every zone."
  type        = bool
}

variable "bucket" {
  description = "What the bucket of cycles, models, releases and backups is called; unique in all of AWS."
  type        = string
}

variable "ami_id" {
  description = "The hosts' image."
  type        = string
}

variable "instance_types" {
  description = "Kinds of GPU instances, best first."
  type        = list(string)
}

variable "spot" {
  description = "Spare capacity."
  type        = bool
}

variable "min_hosts" {
  description = "Hosts at least."
  type        = number
}

variable "max_hosts" {
  description = "Hosts at most."
  type        = number
}

variable "disk_gib" {
  description = "GiB of each host's disk."
  type        = number
}

variable "release" {
  description = "The release of the server that new hosts begin with."
  type        = string
}

variable "bundle" {
  description = "The roles that new hosts play."
  type        = string
}

variable "database_class" {
  description = "The database's size."
  type        = string
}

variable "database_gib" {
  description = "GiB of the database's disk at first."
  type        = number
}

variable "multi_az" {
  description = "A standby of the database in another zone."
  type        = bool
}

variable "backup_days" {
  description = "Days to any moment of which the database can be restored."
  type        = number
}

variable "emails" {
  description = "Who is told of alarms and money."
  type        = list(string)
}

variable "monthly_budget_usd" {
  description = "USD a month."
  type        = number
}

variable "destroyable" {
  description = "Whether `terraform destroy` may take it with all that it holds."
  type        = bool
}

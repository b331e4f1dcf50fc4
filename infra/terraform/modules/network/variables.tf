variable "name" {
  description = "What everything here is called: the environment."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,30}$", var.name))
    error_message = "name is \"${var.name}\"; it must be 2 to 31 of a-z, 0-9 and -, and begin with a letter."
  }
}

variable "cidr" {
  description = "Addresses of the network, from /16 to /20: it is cut into sixteen subnets, of which it uses two a zone."
  type        = string
  default     = "10.40.0.0/16"
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && try(tonumber(split("/", var.cidr)[1]) >= 16 && tonumber(split("/", var.cidr)[1]) <= 20, false)
    error_message = "cidr is \"${var.cidr}\"; it must be IPv4 in CIDR notation, from /16 to /20."
  }
}

variable "zones" {
  description = "Availability zones; RDS wants two."
  type        = list(string)
  validation {
    condition     = length(var.zones) >= 2 && length(var.zones) <= 8 && length(distinct(var.zones)) == length(var.zones)
    error_message = "zones must name 2 to 8 availability zones, each once."
  }
}

variable "nat_per_zone" {
  description = "A NAT gateway in every zone, so that the loss of one zone cuts off no other; else one for all, which costs less."
  type        = bool
  default     = false
}

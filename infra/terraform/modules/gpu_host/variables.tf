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

variable "cidr" {
  description = "The network's addresses: gateways, metrics and the database are reached there."
  type        = string
  validation {
    condition     = can(cidrhost(var.cidr, 0)) && var.cidr != "0.0.0.0/0"
    error_message = "cidr is \"${var.cidr}\"; it must be the network's own, in CIDR notation: hosts are never open to all."
  }
}

variable "subnet_ids" {
  description = "Private subnets, of two zones at least."
  type        = list(string)
  validation {
    condition     = length(distinct(var.subnet_ids)) >= 2
    error_message = "subnet_ids must name two subnets at least: one zone may have no GPU left, or be lost."
  }
}

variable "ami_id" {
  description = "The image: Debian 12 with NVIDIA's driver and Amazon's SSM agent. It is named, not looked up: a newer one must not come by itself."
  type        = string
  validation {
    condition     = can(regex("^ami-[0-9a-f]{8,17}$", var.ami_id))
    error_message = "ami_id is \"${var.ami_id}\"; it must be an image's id, as \"ami-0123456789abcdef0\"."
  }
}

variable "instance_types" {
  description = "Kinds of instances with a GPU, best first; with several, one that has run out stops nothing."
  type        = list(string)
  validation {
    condition     = length(var.instance_types) > 0 && alltrue([for type in var.instance_types : can(regex("^(g4dn|g5|g6|g6e|gr6|p4d|p4de|p5|p5e|p5en)[.][a-z0-9]+$", type))])
    error_message = "instance_types must name types with an NVIDIA GPU, one at least: of g4dn, g5, g6, g6e, gr6, p4d, p4de, p5, p5e, p5en."
  }
}

variable "spot" {
  description = "Spare capacity, which AWS takes back with two minutes' notice; it costs a fraction."
  type        = bool
  default     = false
}

variable "min_hosts" {
  description = "Hosts at least."
  type        = number
  default     = 1
  validation {
    condition     = var.min_hosts >= 0 && floor(var.min_hosts) == var.min_hosts
    error_message = "min_hosts is ${var.min_hosts}; it must be a whole number, 0 or more."
  }
}

variable "max_hosts" {
  description = "Hosts at most."
  type        = number
  default     = 2
  validation {
    condition     = var.max_hosts >= max(var.min_hosts, 1) && var.max_hosts <= 100
    error_message = "max_hosts is ${var.max_hosts}; it must be from min_hosts (${var.min_hosts}), and 1 at least, to 100."
  }
}

variable "disk_gib" {
  description = "GiB of each host's disk: models, in two colours, and the spool."
  type        = number
  default     = 100
  validation {
    condition     = var.disk_gib >= 30 && var.disk_gib <= 16384
    error_message = "disk_gib is ${var.disk_gib}; it must be from 30 to 16384: models and the spool need room."
  }
}

variable "drain_seconds" {
  description = "For how long a host that is to go may end its streams, before AWS takes it anyway."
  type        = number
  default     = 900
  validation {
    condition     = var.drain_seconds >= 120 && var.drain_seconds <= 7200
    error_message = "drain_seconds is ${var.drain_seconds}; it must be from 120 (a stop takes so long) to 7200 (the longest that a hook waits)."
  }
}

variable "bring_up_seconds" {
  description = "For how long a new host may bring itself up, before it is replaced."
  type        = number
  default     = 3600
  validation {
    condition     = var.bring_up_seconds >= 600 && var.bring_up_seconds <= 7200
    error_message = "bring_up_seconds is ${var.bring_up_seconds}; it must be from 600 to 7200 (the longest that a hook waits)."
  }
}

variable "instance_profile_name" {
  description = "What a host may do (module iam)."
  type        = string
}

variable "region" {
  description = "Where this is, as hosts need it."
  type        = string
}

variable "bucket" {
  description = "The bucket that has releases/ and models/."
  type        = string
}

variable "secret_arn" {
  description = "The secret that a host reads when it comes up: a JSON object of Ansible's variables. Its value is never here."
  type        = string
  validation {
    condition     = can(regex("^arn:aws[a-z-]*:secretsmanager:[a-z0-9-]+:[0-9]{12}:secret:[A-Za-z0-9/_+=.@!-]+$", var.secret_arn))
    error_message = "secret_arn is no secret's ARN. It is a name, and not the secret: user data can be read by whoever is on the host."
  }
}

variable "release" {
  description = "The release of the server, as `python -m scripts.release` names it; new hosts begin with it."
  type        = string
  validation {
    condition     = can(regex("^[0-9A-Za-z.]+-[0-9a-f]{12}$", var.release))
    error_message = "release is \"${var.release}\"; it must be a release's id, as \"0.1.0-0123456789ab\" in agentloop-0.1.0-0123456789ab.tar."
  }
}

variable "bundle" {
  description = "The roles and the Ansible that new hosts play, as `python -m scripts.host_bundle` names them."
  type        = string
  validation {
    condition     = can(regex("^[0-9a-f]{12}$", var.bundle))
    error_message = "bundle is \"${var.bundle}\"; it must be 12 of 0-9 and a-f, as in agentloop-ansible-0123456789ab.tar."
  }
}

variable "database_address" {
  description = "Where Postgres is."
  type        = string
}

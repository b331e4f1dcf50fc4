variable "bucket" {
  description = "What the bucket of cycles, models, releases and backups is called; unique in all of AWS."
  type        = string
}

variable "ami_id" {
  description = "Debian 12 with NVIDIA's driver and Amazon's SSM agent."
  type        = string
}

variable "release" {
  description = "The release that new hosts begin with: `python -m scripts.release`."
  type        = string
}

variable "bundle" {
  description = "The roles that new hosts play: `python -m scripts.host_bundle`."
  type        = string
}

variable "emails" {
  description = "Who is told of alarms and money."
  type        = list(string)
}

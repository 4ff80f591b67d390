# The first three are those of cluster/aws.yaml.
variable "region" {
  description = "provider.region of aws.yaml"
  type        = string
  default     = "us-west-2"
}

variable "availability_zones" {
  description = "provider.availability_zone of aws.yaml"
  type        = list(string)
  default     = ["us-west-2a", "us-west-2b"]
  validation {
    condition     = length(var.availability_zones) >= 2
    error_message = "The database wants two zones or more."
  }
}

variable "cluster_name" {
  description = "cluster_name of aws.yaml: what the head's role may end carries this tag"
  type        = string
  default     = "mlray"
}

variable "operators" {
  description = "addresses that may speak SSH to the nodes, by VPN or a bastion; none: nobody from outside"
  type        = list(string)
  default     = []
  validation {
    condition     = alltrue([for range in var.operators : tonumber(split("/", range)[1]) >= 16])
    error_message = "An address range such as 203.0.113.7/32; one wider than /16 is no range of operators."
  }
}

variable "network" {
  description = "the addresses of the network"
  type        = string
  default     = "10.64.0.0/16"
}

variable "database_class" {
  description = "the machine of the registry's PostgreSQL"
  type        = string
  default     = "db.t4g.small"
}

variable "database_storage" {
  description = "GiB of the registry's PostgreSQL"
  type        = number
  default     = 20
}

variable "kept_days" {
  description = "days that backups, logs and versions of objects that were taken away are kept"
  type        = number
  default     = 30
}

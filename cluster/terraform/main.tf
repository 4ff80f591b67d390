# What an mlray cluster on AWS stands on: a network, two buckets, a database for the registry of models, a registry for images, and roles.
# Closed by default: nodes have no public address, all that rests is encrypted, and no rule lets strangers in.
#   terraform -chdir=cluster/terraform init && terraform -chdir=cluster/terraform apply -var operators='["203.0.113.7/32"]'
#   terraform -chdir=cluster/terraform output      what goes into cluster/aws.yaml and settings.ini
terraform {
  required_version = ">= 1.9"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.90"
    }
  }
}

provider "aws" {
  region = var.region
  default_tags {
    tags = { project = var.cluster_name }
  }
}

data "aws_caller_identity" "here" {}

# One key for everything at rest; whoever may use it is told by IAM.
resource "aws_kms_key" "all" {
  description             = "mlray: buckets, database, images, logs"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      {
        Sid       = "Account"
        Effect    = "Allow"
        Principal = { AWS = "arn:aws:iam::${data.aws_caller_identity.here.account_id}:root" }
        Action    = "kms:*"
        Resource  = "*"
      },
      {
        Sid       = "Logs"
        Effect    = "Allow"
        Principal = { Service = "logs.${var.region}.amazonaws.com" }
        Action    = ["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:Describe*"]
        Resource  = "*"
        Condition = { ArnLike = { "kms:EncryptionContext:aws:logs:arn" = "arn:aws:logs:${var.region}:${data.aws_caller_identity.here.account_id}:*" } }
      },
    ]
  })
}

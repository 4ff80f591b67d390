# Two buckets: what is kept (bundles, states of trainings, journaled rows), and who read it.
locals {
  buckets = toset(["kept", "access"])
}

resource "aws_s3_bucket" "this" {
  #checkov:skip=CKV_AWS_144: a second region is a cluster of its own, with a registry of its own
  #checkov:skip=CKV2_AWS_62: nobody waits for events of these buckets
  #checkov:skip=CKV_AWS_145: the bucket of access logs is written by S3, which has no key of ours
  for_each = local.buckets
  bucket   = "${var.cluster_name}-${each.key}-${data.aws_caller_identity.here.account_id}"
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each                = local.buckets
  bucket                  = aws_s3_bucket.this[each.key].id
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.this[each.key].id
  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "this" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.this[each.key].id
  rule {
    bucket_key_enabled = true
    apply_server_side_encryption_by_default {
      sse_algorithm     = each.key == "access" ? "AES256" : "aws:kms" # S3 writes its logs with no key of ours
      kms_master_key_id = each.key == "access" ? null : aws_kms_key.all.arn
    }
  }
}

# An object that was erased is gone for good after so many days: `mlray journal erase` is a promise.
resource "aws_s3_bucket_lifecycle_configuration" "this" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.this[each.key].id
  rule {
    id     = "old"
    status = "Enabled"
    filter {}
    noncurrent_version_expiration {
      noncurrent_days = var.kept_days
    }
    abort_incomplete_multipart_upload {
      days_after_initiation = 7
    }
  }
}

resource "aws_s3_bucket_logging" "kept" {
  bucket        = aws_s3_bucket.this["kept"].id
  target_bucket = aws_s3_bucket.this["access"].id
  target_prefix = "kept/"
}

resource "aws_s3_bucket_policy" "this" {
  for_each = local.buckets
  bucket   = aws_s3_bucket.this[each.key].id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = concat(
      [{
        Sid       = "OnlyEncrypted"
        Effect    = "Deny"
        Principal = "*"
        Action    = "s3:*"
        Resource  = [aws_s3_bucket.this[each.key].arn, "${aws_s3_bucket.this[each.key].arn}/*"]
        Condition = { Bool = { "aws:SecureTransport" = "false" } }
      }],
      each.key != "access" ? [] : [{
        Sid       = "Logs"
        Effect    = "Allow"
        Principal = { Service = "logging.s3.amazonaws.com" }
        Action    = "s3:PutObject"
        Resource  = "${aws_s3_bucket.this[each.key].arn}/*"
        Condition = { StringEquals = { "aws:SourceAccount" = data.aws_caller_identity.here.account_id } }
      }],
    )
  })
}

# The registry of models. Its password is made and kept by AWS, and never in a file of Terraform.
resource "aws_db_subnet_group" "this" {
  name       = var.cluster_name
  subnet_ids = [for subnet in aws_subnet.private : subnet.id]
}

resource "aws_db_parameter_group" "this" {
  name   = var.cluster_name
  family = "postgres16"
  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
  parameter {
    name  = "log_statement"
    value = "ddl"
  }
  parameter {
    name  = "log_min_duration_statement"
    value = "1000" # milliseconds
  }
}

resource "aws_db_instance" "registry" {
  #checkov:skip=CKV_AWS_118: performance insights are on; a role for an agent in the machine is one more role
  identifier                          = "${var.cluster_name}-registry"
  engine                              = "postgres"
  engine_version                      = "16"
  instance_class                      = var.database_class
  allocated_storage                   = var.database_storage
  max_allocated_storage               = 10 * var.database_storage
  db_name                             = "mlray"
  username                            = "mlray"
  manage_master_user_password         = true
  master_user_secret_kms_key_id       = aws_kms_key.all.arn
  iam_database_authentication_enabled = true
  storage_encrypted                   = true
  kms_key_id                          = aws_kms_key.all.arn
  multi_az                            = true
  publicly_accessible                 = false
  db_subnet_group_name                = aws_db_subnet_group.this.name
  parameter_group_name                = aws_db_parameter_group.this.name
  vpc_security_group_ids              = [aws_security_group.database.id]
  backup_retention_period             = var.kept_days
  copy_tags_to_snapshot               = true
  deletion_protection                 = true
  skip_final_snapshot                 = false
  final_snapshot_identifier           = "${var.cluster_name}-registry-last"
  auto_minor_version_upgrade          = true
  performance_insights_enabled        = true
  performance_insights_kms_key_id     = aws_kms_key.all.arn
  enabled_cloudwatch_logs_exports     = ["postgresql", "upgrade"]
}

# Images for Kubernetes, by digest: a tag that was given is never given again.
resource "aws_ecr_repository" "this" {
  name                 = var.cluster_name
  image_tag_mutability = "IMMUTABLE"
  image_scanning_configuration {
    scan_on_push = true
  }
  encryption_configuration {
    encryption_type = "KMS"
    kms_key         = aws_kms_key.all.arn
  }
}

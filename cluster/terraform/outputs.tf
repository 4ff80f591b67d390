output "aws_yaml" {
  description = "for cluster/aws.yaml: give each node type these, take `security_group` away, and set `provider.use_internal_ips: true` where operators come by VPN"
  value = {
    SubnetIds          = [for subnet in aws_subnet.private : subnet.id]
    SecurityGroupIds   = [aws_security_group.nodes.id]
    head_IamInstance   = aws_iam_instance_profile.machine["head"].name
    worker_IamInstance = aws_iam_instance_profile.machine["node"].name
    use_internal_ips   = true
    availability_zone  = join(",", var.availability_zones)
    region             = var.region
  }
}

output "settings_ini" {
  description = "for settings.ini; the password stands in the secret and goes into the URL by PGPASSWORD"
  value = {
    registry    = "postgresql+psycopg://${aws_db_instance.registry.username}@${aws_db_instance.registry.endpoint}/${aws_db_instance.registry.db_name}?sslmode=require"
    store       = "s3://${aws_s3_bucket.this["kept"].bucket}/bundles"
    checkpoints = "s3://${aws_s3_bucket.this["kept"].bucket}/runs"
    archive     = "s3://${aws_s3_bucket.this["kept"].bucket}/journal"
  }
}

output "password" {
  description = "the secret with the registry's password"
  value       = aws_db_instance.registry.master_user_secret[0].secret_arn
}

output "image" {
  description = "where the image of cluster/Dockerfile is pushed"
  value       = aws_ecr_repository.this.repository_url
}

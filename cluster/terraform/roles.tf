# The head starts and ends nodes (cluster/aws-policy.json) and does what nodes do; a node reads and writes the one bucket, reads the database's password and pulls the image.
data "aws_iam_policy_document" "machine" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "machine" {
  for_each           = toset(["head", "node"])
  name               = "${var.cluster_name}-${each.key}"
  assume_role_policy = data.aws_iam_policy_document.machine.json
}

resource "aws_iam_instance_profile" "machine" {
  for_each = aws_iam_role.machine
  name     = each.value.name
  role     = each.value.name
}

resource "aws_iam_role_policy" "launch" {
  name   = "launch"
  role   = aws_iam_role.machine["head"].name
  policy = replace(file("${path.module}/../aws-policy.json"), "\"ec2:ResourceTag/ray-cluster-name\": \"mlray\"", "\"ec2:ResourceTag/ray-cluster-name\": \"${var.cluster_name}\"")
}

# The head gives nodes their role, and no other role to nobody else.
data "aws_iam_policy_document" "pass" {
  statement {
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.machine["node"].arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
}

resource "aws_iam_role_policy" "pass" {
  name   = "pass"
  role   = aws_iam_role.machine["head"].name
  policy = data.aws_iam_policy_document.pass.json
}

data "aws_iam_policy_document" "work" {
  statement {
    actions   = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.this["kept"].arn]
  }
  statement {
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
    resources = ["${aws_s3_bucket.this["kept"].arn}/*"]
  }
  statement {
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [aws_kms_key.all.arn]
  }
  statement {
    actions   = ["secretsmanager:GetSecretValue"]
    resources = [aws_db_instance.registry.master_user_secret[0].secret_arn]
  }
  statement {
    actions   = ["ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer", "ecr:BatchCheckLayerAvailability"]
    resources = [aws_ecr_repository.this.arn]
  }
  statement {
    actions   = ["ecr:GetAuthorizationToken"] # of an account; it has no narrower resource
    resources = ["*"]
  }
}

resource "aws_iam_role_policy" "work" {
  for_each = aws_iam_role.machine
  name     = "work"
  role     = each.value.name
  policy   = data.aws_iam_policy_document.work.json
}

data "aws_iam_policy_document" "flows" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["vpc-flow-logs.amazonaws.com"]
    }
    condition {
      test     = "StringEquals"
      variable = "aws:SourceAccount"
      values   = [data.aws_caller_identity.here.account_id]
    }
  }
}

data "aws_iam_policy_document" "note" {
  statement {
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents", "logs:DescribeLogStreams"]
    resources = ["${aws_cloudwatch_log_group.flows.arn}:*"]
  }
}

resource "aws_iam_role" "flows" {
  name               = "${var.cluster_name}-flows"
  assume_role_policy = data.aws_iam_policy_document.flows.json
}

resource "aws_iam_role_policy" "flows" {
  name   = "note"
  role   = aws_iam_role.flows.name
  policy = data.aws_iam_policy_document.note.json
}

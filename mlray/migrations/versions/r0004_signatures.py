"Evidence names its statement; signatures of bundles and statements are kept."
import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("evidence", sa.Column("statement", sa.String(64)))
    op.create_table(
        "signatures",
        sa.Column("about", sa.String(64), primary_key=True),
        sa.Column("signer", sa.String(64), primary_key=True),
        sa.Column("envelope", sa.String(64), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("signatures")
    op.drop_column("evidence", "statement")

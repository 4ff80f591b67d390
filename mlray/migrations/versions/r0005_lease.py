"Who may act for the time being, with a number that only rises."
import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "leases",
        sa.Column("what", sa.String(160), primary_key=True),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("holder", sa.String(160), nullable=False),
        sa.Column("until", sa.String(32), nullable=False),
    )


def downgrade() -> None: op.drop_table("leases")

"Approvals, lineage, sunsets, keys for some models and some time, requests that are answered once, an outbox."
import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_ADDED = {
    "versions": [("parent", sa.String(64)), ("lineage", sa.JSON), ("deprecated", sa.String(32)), ("sunset", sa.String(10)), ("successor", sa.String(160))],
    "keys": [("owner", sa.String(128)), ("models", sa.String(1024)), ("expires", sa.String(32)), ("revoked", sa.String(32))],
}


def upgrade() -> None:
    for table, columns in _ADDED.items():
        for name, kind in columns: op.add_column(table, sa.Column(name, kind))
    op.create_index("versions_of_parent", "versions", ["parent"])
    op.create_table(
        "approvals",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("alias", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("withdrawn", sa.Integer),
        sa.Column("spent", sa.Integer),
        sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    )
    op.create_index("approvals_of_version", "approvals", ["name", "number"])
    op.create_table(
        "requests",
        sa.Column("key", sa.String(128), primary_key=True),
        sa.Column("asked", sa.String(64), nullable=False),
        sa.Column("result", sa.JSON, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
    )
    op.create_table(
        "outbox",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("target", sa.String(32), primary_key=True),
        sa.Column("delivered", sa.String(32)),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error", sa.Text),
    )
    op.create_table("environments", sa.Column("digest", sa.String(64), primary_key=True), sa.Column("packages", sa.Text, nullable=False))


def downgrade() -> None:
    for table in ("environments", "outbox", "requests", "approvals"): op.drop_table(table)
    op.drop_index("versions_of_parent", "versions")
    for table, columns in _ADDED.items():
        for name, _ in columns: op.drop_column(table, name)

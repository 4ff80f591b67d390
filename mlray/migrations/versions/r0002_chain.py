"The audit becomes a chain, aliases keep where they have been, versions can be retired."
import sqlalchemy as sa
from alembic import context, op

revision = "0002"
down_revision = "0001"

_REFUSE = {
    "sqlite": [f"CREATE TRIGGER events_kept_{verb} BEFORE {verb} ON events BEGIN SELECT RAISE(ABORT, 'rows of the audit are only ever added'); END" for verb in ("UPDATE", "DELETE")],
    "postgresql": [
        "CREATE FUNCTION events_are_kept() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''rows of the audit are only ever added''; END'",
        "CREATE TRIGGER events_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION events_are_kept()"],
}
_ALLOW = {
    "sqlite": [f"DROP TRIGGER events_kept_{verb}" for verb in ("UPDATE", "DELETE")],
    "postgresql": ["DROP TRIGGER events_kept ON events", "DROP FUNCTION events_are_kept()"],
}


def upgrade() -> None:
    op.add_column("versions", sa.Column("retired", sa.String(32)))
    op.create_table(
        "moves",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("alias", sa.String(64), primary_key=True),
        sa.Column("generation", sa.Integer, primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("under", sa.Integer),
        sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    )
    op.add_column("events", sa.Column("prev", sa.String(64)))
    op.add_column("events", sa.Column("mac", sa.String(64)))
    connection = op.get_bind()
    _move_what_was_promoted(connection)
    context.config.attributes["adopt"](connection)
    for statement in _REFUSE[connection.dialect.name]: op.execute(statement)


def _move_what_was_promoted(connection: sa.Connection) -> None:
    events = sa.table("events", sa.column("seq"), sa.column("action"), sa.column("object"), sa.column("details", sa.JSON))
    moves = sa.table("moves", *map(sa.column, ("name", "alias", "generation", "number", "under")))
    for row in connection.execute(sa.select(events).where(events.c.action == "promote").order_by(events.c.seq)).all():
        name, _, number = row.object.rpartition("/")
        generation = row.details["generation"]
        connection.execute(moves.insert().values(name=name, alias=row.details["alias"], generation=generation, number=int(number), under=generation - 1 or None))


def downgrade() -> None:
    for statement in _ALLOW[op.get_bind().dialect.name]: op.execute(statement)
    for table, column in (("events", "mac"), ("events", "prev"), ("versions", "retired")): op.drop_column(table, column)
    op.drop_table("moves")

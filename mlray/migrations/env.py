"Alembic's environment: runs the revisions on the connection that `mlray.registry` hands over, inside its transaction."
from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True, transactional_ddl=True)
context.run_migrations()

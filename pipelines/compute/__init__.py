"""Ray, apart from training: the connection (`cluster`), pools of actors (`actor_pool`), functions over many items
(`tasks`), and messages from workers to the driver (`mailbox`)."""

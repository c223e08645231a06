"""Ray, apart from training: the connection, pools of actors, functions over many items."""

"""Programs: what the commands of ``lrm`` run. Only these print."""

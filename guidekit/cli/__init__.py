"""The command line: settings, a plan, a session that draws it, the record that it leaves."""

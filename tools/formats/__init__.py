"""Where weights can lie and what each place calls them: a file a format, read and written tensor by tensor."""

"""A project of Django, whose tasks run in jobd."""

"""The page to paint on and its API: `guidekit serve`. It needs the extra `guidekit[serve]`."""

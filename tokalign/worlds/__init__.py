"""Made-up worlds in which every answer, and every first wrong token, is known exactly."""

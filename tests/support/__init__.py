"""What several tests share: ring arithmetic for attackers, and heads to attack."""

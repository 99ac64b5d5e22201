"""The processes of a job: who they are, how they meet, and that none waits for a lost one."""

"""What a study is made of: its grid, its runs on this machine or in an array, its verdict, its report."""

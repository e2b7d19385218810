"""What a target network learns of each image, one file for each way, all of one signature."""

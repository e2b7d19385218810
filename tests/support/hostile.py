"""Names of files and classes that are as unfriendly as names can be."""

SCRIPT = '"><script>hacked = 1<'  # a folder; what lies in it ends the element
RIGHT = "\u202eשלום"
LONG = ("long " * 50)[:250]
IMAGES, CLUSTERS = 36, 5

from pftools.cli import main

main()

"""The words that synthetic receipts are made of; shops, people and streets are invented."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split(","))


CURRENCIES = {"MYR": "RM", "USD": "$", "EUR": "€", "GBP": "£", "SGD": "S$"}

NAMES = _words("""
    Amber Anchor Aster Birch Blue Brook Cedar Copper Coral Crown Delta Eagle Elm Ember Falcon
    Fern Golden Green Harbour Hazel Iris Ivory Jade Juniper Lotus Lunar Maple Marble Meadow
    Metro Mint North Oak Ocean Olive Orchid Pearl Pine Prime River Rose Royal Ruby Saffron
    Silver Sky Star Stone Summit Sun Swan Tiger Union Velvet Violet Willow Windmill Zenith
""")
SYLLABLES = _words("""
    ba bel bo cal chi da dor el fa fen gar go hal im jo ka kel la lin lo mar mi mon na nor or
    pa per qui ra ren ri ro sa sel shi so ta tam ter ti to u val ve vi wen xa ya yo za zen
""")
TRADES = _words("""
    Bakery Bistro Books Cafe Clinic Dental Deli Diner Electric Florist Foods Garage Grill
    Hardware Hotel House Kitchen Laundry Market Mart Motors Optics Parcel Pharmacy Pizza Press
    Repair Shop Stationery Stores Studio Supplies Taxi Tools Trading Travel
""")
ENDINGS = ("", "", "Sdn Bhd", "Ltd", "GmbH", "Inc.", "& Co", "Pte Ltd", "& Sons")
STREETS = _words("""
    Street Road Lane Avenue Square Hill Court Jalan
""")
PEOPLE = _words("""
    Ada Ali Ben Chen Dina Eva Farid Gita Hana Ida Jon Kim Lee Lia Mei Nina Omar Pia Raj Rosa
    Sam Tara Uma Wei Yusuf Zoe
""")
GOODS = _phrases("""
    Apple juice, Batteries, Black tea, Bread roll, Brake pads, Butter, Candles, Car wash,
    Cheese, Chicken rice, Coffee, Cough syrup, Day pass, Eggs, Envelopes, Eye drops, Flat
    white, Flour, Fried noodles, Garlic bread, Glue, Green tea, Hand soap, Honey, Key copy,
    Lamp, Latte, Lemons, Light bulb, Milk, Mushroom soup, Nails, Notebook, Olive oil, Oil
    filter, Onions, Orange cake, Paint, Pasta, Pencils, Petrol, Plain rice, Plasters, Postage,
    Room service, Rope, Salad, Sandwich, Screws, Shampoo, Shirt, Stamps, Sugar, Tape,
    Tomatoes, Towel, Umbrella, Vitamin C, Water, Wine
""")
GREETINGS = _phrases("""
    Thank you, Please come again, Have a nice day, Goods sold are not returnable, Keep this
    receipt, Open daily 8 to 8, Follow us online, Members save more
""")

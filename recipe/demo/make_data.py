"""The demo's data: support messages to an online shop, each answered with one line for the help desk, `team | urgency`.

    "The doorbell does not ring. Please fix it today."  ->  technical | urgent

Teams:    account (sign-in, profile, personal data), billing (payments, invoices, prices charged), sales (advice and
          offers before buying), shipping (parcels on their way), technical (devices and apps that fail).
Urgency:  urgent where the customer names a deadline within a day or says that something stands still, else normal.

A message is a request and a remark on time. Each request occurs once as urgent and once as normal, so neither
half gives the other away, and the five teams are equally frequent: one fixed answer is right in 10 % of the rows.
Held-out messages are made of requests, remarks and products that occur in no training row, so a model that only
remembers wordings fails on them. All sentences were written for this project; any likeness to customers is chance.

`python recipe/demo/make_data.py` writes train.jsonl and heldout.jsonl beside this file; a test checks that they agree.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

FOLDER = Path(__file__).parent
SEED = 7
URGENCIES = ("urgent", "normal")
SYSTEM = "Answer with team and urgency."  # shorter than the one that the chat template puts in its place

# team -> (requests for training, requests held out); {p} is a product, {n} an amount in euros
REQUESTS = {
    "account": (
        """
        I forgot my password and the reset mail never arrives.
        Your site says my account is locked.
        How can I change the email address of my account?
        Please delete my account and all personal data.
        I can no longer sign in after changing my phone.
        The two-factor code is always rejected at login.
        Somebody else seems to be logged in under my name.
        My user name is spelled wrong in my profile.
        I would like to add my wife as a second user.
        Can you merge my two accounts into one?
        The verification link for my new account has expired.
        Please update the surname in my profile, I got married.
        I want to see which personal data you hold about me.
        My login stopped working after I changed my email.
        Our former manager left, please remove her access.
        I got a mail about a login from another country.
        The password reset page rejects every new password.
        Please give my colleague admin rights on our account.
        I registered twice by mistake, please close one profile.
        Where do I turn off the newsletter in my profile?
        My account was suspended and I do not know why.
        I lost the phone with my authenticator codes.
        Please move the account from my private to my work email.
        The login page does not know my email address.
        I need new backup codes to sign in.
        Can I have a separate login for our intern?
        My profile shows the birthday of another person.
        Someone changed my password without my knowledge.
        Please correct the phone number in my user profile.
        My children should not be able to sign in as me.
        """,
        """
        I am locked out after three wrong passwords.
        How do I close my user account for good?
        I cannot log in because the code goes to my old phone.
        Please change the name on my profile.
        I think a stranger has my password.
        We need a login for a new employee.
        My email address changed, please update it in my profile.
        The link to confirm my registration does not arrive.
        Please send me a copy of the personal data you store.
        Our admin is gone and nobody else has the password.
        My account has disappeared, I cannot sign in.
        Please take my ex-husband off our shared account.
        """,
    ),
    "billing": (
        """
        I was charged twice for the same order.
        My invoice shows {n} euros but I agreed to less.
        Please send me the invoice for the {p}.
        My credit card was declined at the checkout.
        The refund of {n} euros is not on my bank account yet.
        The VAT number is missing on your invoice.
        You debited {n} euros that I never authorised.
        Can I pay for the {p} in three instalments?
        I was billed although I cancelled the subscription.
        The discount code is missing on my invoice.
        Please change the billing address on my invoice.
        I would like to switch from card to direct debit.
        I got a payment reminder but I paid last week.
        My bank statement shows a fee of {n} euros from you.
        Why did the monthly fee go up to {n} euros?
        Our accountant needs a receipt for the {p}.
        I paid by transfer and the order still says unpaid.
        The amount on the receipt does not match my payment.
        You charged me in dollars instead of euros.
        Please refund the {n} euros I paid too much.
        My gift card balance is {n} euros too low.
        I want my money back for the cancelled {p}.
        The invoice is made out to the wrong company.
        The yearly plan was renewed and charged without notice.
        Please stop the automatic payments from my card.
        I still have not received the credit note for the {p}.
        The card on file has expired, how do I pay now?
        Two invoices carry the same number, which one do I pay?
        I see a charge of {n} euros that I do not recognise.
        Please split the invoice between our two offices.
        """,
        """
        My card was charged for the {p} two times.
        I need a corrected invoice with our tax number.
        When do I get my refund of {n} euros?
        PayPal refuses my payment for the {p}.
        You sent a reminder for a bill that I have paid.
        The voucher over {n} euros was not deducted.
        Please book the subscription fee from another bank account.
        I do not understand the extra {n} euros on my bill.
        I cancelled last month and you still charge me.
        We have no receipt for our last payment.
        Can we pay the bill of {n} euros in two parts?
        Your invoice has the wrong billing address.
        """,
    ),
    "sales": (
        """
        Do you offer a discount for twenty pieces of the {p}?
        Which {p} would you recommend for a small office?
        Is the {p} available in white?
        When will the {p} be back in stock?
        Please send us a quote for ten units of the {p}.
        What is the difference between the {p} and the pro model?
        Does the {p} work with Apple devices before I buy it?
        Do you have a student price for the {p}?
        Can I try the {p} before I buy it?
        We want to equip a hotel and would like an offer.
        Do you sell a cheaper model than the {p}?
        How long is the warranty if I buy the {p}?
        Do you sell spare batteries for the {p}?
        I would like to order forty units, what is your best price?
        Could someone advise me which model suits a large house?
        Will you offer the {p} in the summer sale as well?
        Do you also sell to schools, and at what price?
        We are interested in becoming a reseller.
        Can I reserve the {p} until I have decided?
        Would you recommend the {p} to a beginner?
        Do you have a showroom where I can see the {p}?
        What would the {p} with installation cost us?
        Does the bundle include a {p}?
        I am looking for a present, what would you suggest?
        Will there be a new version of the {p} this year?
        Please call me, I want to buy for our whole team.
        How many {p}s do you have in stock for a bulk order?
        Can you match the price of another shop for the {p}?
        I want to buy a {p} for outdoors, which one is right?
        We would like a demonstration of the {p} at our office.
        """,
        """
        What would thirty {p}s cost for our company?
        Which model do you recommend to a family of four?
        Do you have the {p} in black as well?
        Please make us an offer for a new branch.
        Is the {p} a good buy for a flat of two rooms?
        Can you give me advice before I buy a {p}?
        Do you offer charities a discount on the {p}?
        I would like to buy the {p}, is it in stock?
        Can I buy the {p} with a longer warranty?
        May I try a {p} in your showroom before I buy it?
        Do you sell a smaller model of the {p}?
        We are comparing offers, what is your price for fifty units?
        """,
    ),
    "shipping": (
        """
        My parcel has not arrived yet.
        The tracking page has shown no change for days.
        The courier left the {p} with a neighbour I do not know.
        Please send the {p} to my office instead.
        Where is the {p} I ordered last week?
        The package was delivered to the wrong street.
        The tracking number you sent me is invalid.
        Only one of two parcels has reached me.
        Can I collect the {p} at the depot?
        The driver says nobody was at home, but I was.
        I wrote the wrong house number on my order.
        The {p} is still in your warehouse, says the courier.
        Is it possible to change the delivery day?
        The delivery is five days late.
        My parcel was sent back to you by mistake.
        How long does delivery to Spain take?
        The box was empty when the courier handed it over.
        The parcel is stuck at customs.
        Please hold the delivery, we are moving house.
        The courier threw the package over the fence.
        I chose express and the {p} has not been dispatched.
        Tracking says delivered, but there is no parcel here.
        Could the driver ring me before he delivers the {p}?
        My order was packed but never picked up by the carrier.
        The {p} arrived in a torn and wet box.
        Please put both orders into one shipment.
        The parcel shop has no package under my name.
        I got the parcel of another customer.
        The carrier cannot find our address.
        My delivery was announced for Monday and did not come.
        """,
        """
        I am still waiting for my package with the {p}.
        The parcel went to my old address.
        The tracking has been stuck in Hamburg since Friday.
        Can the courier leave the {p} in the garage?
        The driver did not ring and took the package away again.
        Half of my delivery is missing.
        Has the {p} been dispatched yet?
        Please deliver to the back entrance of our warehouse.
        The carrier lost my parcel.
        The courier brought a package that is not mine.
        I will be away, please deliver the {p} a week later.
        The post office says that my shipment never arrived there.
        """,
    ),
    "technical": (
        """
        The {p} does not switch on any more.
        The app crashes as soon as I open it.
        My {p} loses the wireless connection all the time.
        The {p} shows error 14 and stops.
        Since the update the {p} does not react.
        The screen of the {p} stays black.
        The {p} makes a loud humming noise.
        How do I reset the {p} to factory settings?
        The {p} cannot find our network.
        The app shows no data from the {p}.
        The battery of the {p} is empty after an hour.
        The {p} restarts by itself every few minutes.
        I cannot pair the {p} with my phone.
        The firmware update stops at 40 percent.
        The buttons of the {p} do not respond.
        The picture of the {p} is blurred.
        The {p} gets very hot while charging.
        All our devices went offline at the same moment.
        The {p} shows the wrong time after a restart.
        The sensor of the {p} reports nonsense.
        Your app is very slow on my tablet.
        There is no sound from the {p}.
        The {p} ignores the schedule I set in the app.
        The light on the {p} blinks red, what does it mean?
        Recordings from the {p} cannot be played.
        The {p} does not work with the latest app version.
        The app freezes when I add the {p}.
        The {p} beeps all night.
        The cable is plugged in but the {p} does not charge.
        The {p} was working and is dead since the storm.
        """,
        """
        The {p} keeps freezing.
        My {p} no longer connects to the internet.
        The app closes itself after a few seconds.
        The display of the {p} flickers.
        The {p} does not start after the last update.
        I get error 7 when I start the {p}.
        Nothing happens when I press the power button of the {p}.
        How do I install the new firmware on the {p}?
        The {p} is offline although our network works.
        The {p} crackles and then the sound is gone.
        The {p} does not charge overnight.
        The app does not find my {p}.
        """,
    ),
}

# urgency -> (remarks for training, remarks held out)
REMARKS = {
    "urgent": (
        """
        I need this solved today.
        Please answer within the hour.
        We cannot work until this is done.
        This is an emergency.
        It must be settled by tonight.
        Our shop is closed because of this.
        I am leaving tomorrow morning and need it before.
        Please call me back immediately.
        The deadline is today at noon.
        This cannot wait until tomorrow.
        Everything stands still here.
        I need an answer right now.
        Please help at once.
        We are losing customers every minute.
        Ten people are waiting and cannot go on.
        It is very urgent.
        I have to know before five o'clock today.
        Please treat this with top priority.
        Our event starts in three hours.
        As fast as you can, please, we are stuck.
        My boss needs it this afternoon.
        Tomorrow is too late.
        We had to stop all work.
        Please do it now, I cannot wait.
        I need it by tomorrow at the latest.
        The whole office is blocked.
        """,
        """
        Please see to it immediately, it is urgent.
        We need a solution by this evening.
        Nobody here can work.
        It has to be done before tomorrow.
        I cannot wait any longer, please reply now.
        Please hurry, we open in one hour.
        Our production has stopped.
        I need to hear from you today.
        My flight leaves tonight, so please be quick.
        This is critical for us, every minute counts.
        """,
    ),
    "normal": (
        """
        There is no hurry.
        Whenever you have time.
        Thanks in advance.
        It can wait until next week.
        Any day this month is fine.
        Kind regards, and have a nice day.
        I am just curious.
        Please answer when it suits you.
        This is not urgent.
        No rush at all.
        I am in no hurry with this.
        Take your time.
        It is only a small thing.
        Next month is early enough.
        Thank you for your help.
        I can live with it for now.
        An answer in a few days is fine.
        I will be on holiday until the end of the month anyway.
        It does not matter much when.
        Many thanks, and best wishes.
        Just so that you know.
        A reply some time next week would be nice.
        Please look at it when you get round to it.
        It is not important.
        """,
        """
        No need to hurry.
        Some time in the next weeks is fine.
        Thanks a lot, best regards.
        You can take a few days for it.
        It is not pressing at all.
        There is plenty of time.
        Just reply when you can.
        I can easily wait.
        """,
    ),
}

# products in training rows, products held out
PRODUCTS = (
    "thermostat doorbell camera speaker printer lamp router headset tablet heater television vacuum freezer radio "
    "phone mouse watch fan mixer microphone telescope turntable amplifier humidifier lawnmower grill laminator "
    "shredder calculator webcam soundbar dryer toothbrush stove cooker sewing-machine guitar piano scooter bicycle "
    "treadmill generator drill saw",
    "projector keyboard scanner monitor",
)


def rows(held_out: bool) -> list[dict[str, list[dict[str, str]]]]:
    """The rows of one of the two files, in the order in which they are written."""
    chance = random.Random(f"{SEED} {'held out' if held_out else 'train'}")
    remarks = {urgency: _Deck(lines(texts[held_out]), chance) for urgency, texts in REMARKS.items()}
    products = _Deck(PRODUCTS[held_out].split(), chance)
    made = []
    for team, requests in REQUESTS.items():
        for number, text in enumerate(lines(requests[held_out])):
            # A request for training is made with each urgency, a held-out one with one of them in turn.
            for urgency in (URGENCIES[number % 2],) if held_out else URGENCIES:
                request = text.format(p=products.draw(), n=chance.randrange(12, 400))
                remark = remarks[urgency].draw()
                message = f"{remark} {request}" if chance.random() < 0.25 else f"{request} {remark}"
                made.append(_row(message, f"{team} | {urgency}"))
    chance.shuffle(made)
    return made


class _Deck:
    """Draws every card once before any comes again, so that all are equally frequent."""

    def __init__(self, cards: list[str], chance: random.Random) -> None:
        self._cards, self._chance, self._left = cards, chance, list[str]()

    def draw(self) -> str:
        if not self._left:
            self._left = self._chance.sample(self._cards, len(self._cards))
        return self._left.pop()


def _row(message: str, answer: str) -> dict[str, list[dict[str, str]]]:
    turns = (("system", SYSTEM), ("user", message), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def as_jsonl(made: list[dict[str, list[dict[str, str]]]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in made)


def main() -> None:
    for name, held_out in (("train.jsonl", False), ("heldout.jsonl", True)):
        (FOLDER / name).write_text(as_jsonl(rows(held_out)), encoding="utf-8")


if __name__ == "__main__":
    main()

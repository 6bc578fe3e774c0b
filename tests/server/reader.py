"""Someone in front of the page, and what they see."""


class Reader:
    """Someone in front of the page. asked: the bodies of the requests that it sent."""

    def __init__(self, page, server):
        self.page, self.server, self.asked = page, server, []
        page.on("request", lambda request: request.method == "POST" and self.asked.append(request.post_data_json))

    def ask(self, text):
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def wait(self, selector):
        return self.page.wait_for_selector(selector)

    def ends(self, turn=1):
        """Waits until the answer has ended."""
        self.wait(f"article:nth-of-type({turn}) .again")

    def hears(self, question):
        """Asks, and waits for the end of the answer."""
        self.ask(question)
        self.ends(self.page.locator("article").count())

    @property
    def answer(self):
        return self.page.locator(".answer").last.evaluate("element => element.textContent")

    def run(self, code, *arguments):
        return self.page.evaluate(code, *arguments)


def letters(service, text):
    """A token for each letter, for each byte of other characters."""
    return [token for letter in text for token in service.model.tokenizer.encode(letter).tolist()]


def colours(reader, selector, style="backgroundColor"):
    """The colours of elements, as the browser paints them: red, green and blue from 0 to 255."""
    return reader.run(
        """([selector, style]) => {
            const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
            return [...document.querySelectorAll(selector)].map((element) => {
                paint.fillStyle = getComputedStyle(element)[style];
                paint.fillRect(0, 0, 1, 1);
                return [...paint.getImageData(0, 0, 1, 1).data.slice(0, 3)];
            });
        }""",
        [selector, style],
    )


def luminance(colour):
    """Of WCAG 2."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)

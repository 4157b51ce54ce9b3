// Opens a page in headless Chromium without a network, as on a phone and on a desktop, in light and in dark: takes a
// screenshot of each and prints what is wrong. node page.cjs PAGE.html DIRECTORY CHROMIUM
"use strict";
const { join, resolve } = require("node:path");
const { pathToFileURL } = require("node:url");
const { chromium } = require("playwright-core");
const axe = require("axe-core");

const SIZES = { phone: { width: 390, height: 844 }, desktop: { width: 1280, height: 900 } };
const SCHEMES = ["light", "dark"];
const NARROWEST = { width: 320, height: 640 }; // WCAG 2.2, 1.4.10

const overflows = () => document.documentElement.scrollWidth > document.documentElement.clientWidth;
const openAll = () => document.querySelectorAll("details").forEach((one) => (one.open = true));
const deadAnchors = () =>
  [...document.querySelectorAll('a[href^="#"]')]
    .map((one) => decodeURIComponent(one.getAttribute("href").slice(1)))
    .filter((id) => !document.getElementById(id));
const judge = () => axe.run(document, { resultTypes: ["violations"] });

(async () => {
  const [html, directory, executablePath] = process.argv.slice(2);
  const address = pathToFileURL(resolve(html)).href;
  const report = { requests: [], overflow: {}, console: [], axe: {}, anchors_missing: [], contents: {} };
  const browser = await chromium.launch({ executablePath });
  for (const colorScheme of SCHEMES) {
    for (const [size, viewport] of Object.entries(SIZES)) {
      const name = `${size}-${colorScheme}`;
      const context = await browser.newContext({ viewport, colorScheme });
      await context.setOffline(true);
      await context.route((url) => !["file:", "data:"].includes(url.protocol), (route) => route.abort());
      const page = await context.newPage();
      page.on("request", (one) => /^(file|data):/.test(one.url()) || report.requests.push(one.url()));
      page.on("console", (one) => one.type() === "error" && report.console.push(one.text()));
      page.on("pageerror", (error) => report.console.push(String(error)));
      await page.goto(address);
      await page.screenshot({ path: join(directory, `${name}.png`) });

      await page.evaluate(openAll);
      report.overflow[name] = await page.evaluate(overflows);
      await page.evaluate(axe.source);
      report.axe[name] = (await page.evaluate(judge)).violations.map(({ id, impact, nodes }) => ({
        id,
        impact,
        nodes: nodes.length,
        first: nodes[0].html.slice(0, 200),
      }));
      report.anchors_missing = await page.evaluate(deadAnchors);
      if (size === "phone") {
        await page.setViewportSize(NARROWEST);
        report.overflow[`narrowest-${colorScheme}`] = await page.evaluate(overflows);
        report.contents[name] = await unfold(page);
      } else {
        report.contents[name] = { side: await page.locator("nav").isVisible() };
      }
      await context.close();
    }
  }
  await browser.close();
  process.stdout.write(JSON.stringify(report));
})();

// The contents on a phone: folded, unfolded by their link, folded again by choosing something.
async function unfold(page) {
  const nav = page.locator("nav");
  const seen = { before: await nav.isVisible() };
  await page.locator('header a[href="#contents"]').click();
  seen.unfolded = await nav.isVisible();
  if (!seen.unfolded) return seen;
  await nav.locator("li a").last().click();
  return { ...seen, after: await nav.isVisible() };
}

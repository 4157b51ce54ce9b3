// Opens the status page of a running service in headless Chromium, on a phone and a desktop, in light and dark: screenshots,
// what axe-core finds, what it asks for, whether the keyboard gets everywhere, and whether it is live.
// node status.cjs ADDRESS DIRECTORY CHROMIUM; a line on stdin: something has changed, look whether the page shows it.
"use strict";
const { join } = require("node:path");
const { createInterface } = require("node:readline");
const { chromium } = require("playwright-core");
const axe = require("axe-core");

const SIZES = { phone: { width: 390, height: 844 }, desktop: { width: 1280, height: 900 } };
const overflows = () => document.documentElement.scrollWidth > document.documentElement.clientWidth;
const judge = () => axe.run(document, { resultTypes: ["violations"] });
const say = (one) => process.stdout.write(`${JSON.stringify(one)}\n`);

(async () => {
  const [address, directory, executablePath] = process.argv.slice(2);
  const report = { requests: [], console: [], overflow: {}, axe: {}, focus: [], still: "" };
  const browser = await chromium.launch({ executablePath });
  const watched = (page) => {
    page.on("request", (one) => report.requests.push(one.url()));
    page.on("console", (one) => one.type() === "error" && report.console.push(one.text()));
    page.on("pageerror", (error) => report.console.push(String(error)));
  };
  for (const colorScheme of ["light", "dark"]) {
    for (const [size, viewport] of Object.entries(SIZES)) {
      const name = `${size}-${colorScheme}`;
      const context = await browser.newContext({ viewport, colorScheme, bypassCSP: true }); // for axe, which is injected
      const page = await context.newPage();
      watched(page);
      await page.goto(address);
      await page.screenshot({ path: join(directory, `status-${name}.png`), fullPage: size === "desktop" });
      report.overflow[name] = await page.evaluate(overflows);
      await page.setViewportSize({ width: 320, height: 640 }); // WCAG 2.2, 1.4.10
      report.overflow[`narrowest-${name}`] = await page.evaluate(overflows);
      await page.evaluate(axe.source);
      report.axe[name] = (await page.evaluate(judge)).violations.map((one) => `${one.id}: ${one.nodes[0].html}`);
      await context.close();
    }
  }
  const quiet = await (await browser.newContext({ javaScriptEnabled: false })).newPage();
  await quiet.goto(address);
  report.still = await quiet.locator("#state").innerText();

  const page = await (await browser.newContext()).newPage(); // with its Content-Security-Policy
  watched(page);
  await page.goto(address);
  for (let step = 0; step < 40; step += 1) {
    await page.keyboard.press("Tab");
    const at = await page.evaluate(() => document.activeElement.getAttribute("aria-label") || document.activeElement.tagName);
    if (at === "BODY") break;
    report.focus.push(at);
  }
  await page.evaluate(() => document.activeElement.blur());
  say(report);
  for await (const line of createInterface({ input: process.stdin })) {
    const [selector, text] = JSON.parse(line);
    try {
      await page.locator(selector, { hasText: text }).waitFor({ timeout: 15000 });
      say({ seen: true });
    } catch (error) {
      say({ seen: false, shows: await page.locator("body").innerText(), why: String(error).slice(0, 300) });
    }
  }
  await browser.close();
})();

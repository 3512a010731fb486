// The canvas of regions. props.value: {boxes: [[phrase, left, top, right, bottom], ...], phrases, colours, ratio,
// picture}; the picture, if there is one, lies behind the boxes.
const find = (name) => element.querySelector(name);
const clamp = (value) => Math.min(1, Math.max(0, Math.round(value * 100) / 100));
const boxes = () => (props.value?.boxes ?? []).map((box) => [...box]);
let held = null;  // while a pointer is down: which box, what is done with it, and where the pointer began

function draw(shown) {
    const { phrases = [], colours = [], ratio = 1, picture = "" } = props.value ?? {};
    const [select, area] = [find("select"), find(".area")];
    const names = [...new Set([...phrases, ...shown.map((box) => box[0])])];
    if ([...select.options].map((one) => one.value).join("\n") !== names.join("\n"))
        select.replaceChildren(...names.map((name) => new Option(name, name)));
    area.style.aspectRatio = ratio;
    area.style.backgroundImage = picture && `url("${picture}")`;
    area.replaceChildren(...shown.map(([phrase, left, top, right, bottom], number) => {
        const one = document.createElement("button");
        one.className = "box";
        one.dataset.n = number;
        one.textContent = phrase;
        one.ariaLabel = `Box of ${phrase}: ${[left, top, right, bottom].join(", ")}. ` +
            "Arrow keys move it, with Shift they size it, Delete removes it.";
        Object.assign(one.style, { left: `${left * 100}%`, top: `${top * 100}%`, width: `${(right - left) * 100}%`,
            height: `${(bottom - top) * 100}%`, color: colours[number % colours.length] });
        one.append(document.createElement("span"));
        return one;
    }));
    if (!shown.length) area.append("Drag here to say where a thing goes.");
}

function changed(next, focus) {
    const free = (props.value.phrases ?? []).find((one) => !next.some((box) => ` ${box[0]} `.includes(` ${one} `)));
    props.value = { ...props.value, boxes: next };
    draw(next);
    if (focus !== undefined) find(`[data-n="${focus}"]`)?.focus();
    else if (free) find("select").value = free;
    trigger("input", { value: next });
}

function put(phrase, sides) {  // one box for each phrase
    if (!phrase) return;
    changed([...boxes().filter((box) => box[0] !== phrase), [phrase, ...sides]]);
}

function pulled(event) {
    const frame = find(".area").getBoundingClientRect();
    const [x, y] = [(event.clientX - frame.left) / frame.width, (event.clientY - frame.top) / frame.height];
    const next = boxes();
    if (held.kind === "new") {
        const sides = [Math.min(held.x, x), Math.min(held.y, y), Math.max(held.x, x), Math.max(held.y, y)].map(clamp);
        return [...next.filter((box) => box[0] !== held.phrase), [held.phrase, ...sides]];
    }
    shift(next[held.number], x - held.x, y - held.y, held.kind === "size");
    return next;
}

function shift(box, right, down, size) {
    const [width, height] = [box[3] - box[1], box[4] - box[2]];
    if (size) [box[3], box[4]] = [clamp(Math.max(box[1] + 0.05, box[3] + right)), clamp(Math.max(box[2] + 0.05, box[4] + down))];
    else {
        box[1] = clamp(Math.min(1 - width, box[1] + right));
        box[2] = clamp(Math.min(1 - height, box[2] + down));
        [box[3], box[4]] = [clamp(box[1] + width), clamp(box[2] + height)];
    }
}

element.addEventListener("pointerdown", (event) => {
    const area = event.target.closest(".area");
    if (!area) return;
    const frame = area.getBoundingClientRect();
    const box = event.target.closest(".box");
    held = { x: (event.clientX - frame.left) / frame.width, y: (event.clientY - frame.top) / frame.height,
        kind: !box ? "new" : event.target.tagName === "SPAN" ? "size" : "move",
        number: box && Number(box.dataset.n), phrase: find("select").value };
    if (held.kind === "new" && !held.phrase) held = null;
});
addEventListener("pointermove", (event) => { if (held) { event.preventDefault(); draw(pulled(event)); } });
addEventListener("pointerup", (event) => {
    if (!held) return;
    const next = pulled(event);
    const last = next.at(-1);
    const tiny = held.kind === "new" && (last[3] - last[1] < 0.04 || last[4] - last[2] < 0.04);
    const focus = held.kind === "new" ? undefined : held.number;
    held = null;
    if (tiny) draw(boxes()); else changed(next, focus);
});
element.addEventListener("keydown", (event) => {
    const box = event.target.closest(".box");
    const step = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
    const next = boxes();
    if (!box || !(step || event.key === "Delete" || event.key === "Backspace")) return;
    event.preventDefault();
    const number = Number(box.dataset.n);
    if (step) shift(next[number], ...step, event.shiftKey); else next.splice(number, 1);
    changed(next, step ? number : undefined);
});
element.addEventListener("click", (event) => {
    if (event.target.matches(".add")) put(find("select").value, [0.25, 0.25, 0.75, 0.75]);
    if (event.target.matches(".clear")) changed([]);
});
watch("value", () => { if (!held) draw(boxes()); });
draw(boxes());
